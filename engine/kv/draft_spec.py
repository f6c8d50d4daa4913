"""KV that drafts keep for each row slot, in addition to the pages of requests: pools of fixed size. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass

from engine.config.speculation import SpeculationConfig


@dataclass(frozen=True, slots=True)
class DraftKVSpec:
    """KV that one row slot keeps, whatever the length of its context.

    first, ring: number of pages that stay in place, and of pages that wrap around (see policies.ring_table). queries:
    number of positions whose queries are kept, in every layer and query head. block: largest number of tokens of one
    row that a forward may compute through the ring; None: no limit.
    """

    first: int = 0
    ring: int = 0
    queries: int = 0
    block: int | None = None

    @property
    def pages(self) -> int:
        return self.first + self.ring


def draft_kv_spec(settings: SpeculationConfig, page_size: int) -> DraftKVSpec:
    """Return the KV that drafts with these settings keep; all zero where they read pages that requests own."""
    kv, max_gamma = settings.resolved_kv, settings.max_draft_tokens
    if max_gamma and kv.policy == "snapkv":
        # Rejected drafts overwrite the previous turn of the ring; reserve room so that recent pages and saved queries
        # survive them.
        return DraftKVSpec(
            first=(kv.budget - kv.recent) // page_size,
            ring=kv.recent // page_size + -(-max_gamma // page_size),
            queries=kv.queries + (max_gamma if kv.reselect else 0),
        )
    if max_gamma and kv.policy == "window" and settings.drafter == "model":
        # The window, and room for the tokens that are written ahead of it. Prompts pass through it in blocks of a
        # quarter of the budget, so that the first query of a block still has most of a window before it.
        block = max(page_size, kv.budget // 4 // page_size * page_size)
        first = -(-kv.sink // page_size)
        ring = kv.budget // page_size - first + -(-max(max_gamma, block) // page_size)
        return DraftKVSpec(first=first, ring=ring, block=block)
    return DraftKVSpec()
