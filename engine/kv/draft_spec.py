"""What drafts keep for each row slot, beside the pages that requests own: pools of fixed size. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass

from engine.config.speculation import SpeculationConfig


@dataclass(frozen=True, slots=True)
class Footprint:
    """Of a row slot, whatever the context.

    first, ring: pages of KV that stay where they are, and that go round (see policies.ring_table). queries: positions
    whose queries are kept, in every layer and query head. block: most tokens of one row that a forward may compute
    through the ring; None: as many as it likes.
    """

    first: int = 0
    ring: int = 0
    queries: int = 0
    block: int | None = None

    @property
    def pages(self) -> int:
        return self.first + self.ring


def footprint(settings: SpeculationConfig, page_size: int) -> Footprint:
    """Of the drafts that the settings describe; nothing, where they read pages that requests own."""
    kv, most = settings.settled_kv, settings.most_drafts
    if most and kv.policy == "snapkv":
        # Drafts that came to nothing have overwritten what stood a ring before them, and must not overwrite queries
        # that count: there is room for them beside both.
        return Footprint(
            first=(kv.budget - kv.recent) // page_size,
            ring=kv.recent // page_size + -(-most // page_size),
            queries=kv.queries + (most if kv.reselect else 0),
        )
    if most and kv.policy == "window" and settings.drafter == "model":
        # The window, and what is written ahead of it. Prompts go through it in blocks of a quarter, lest the first
        # query of one sees too little before it.
        block = max(page_size, kv.budget // 4 // page_size * page_size)
        first = -(-kv.sink // page_size)
        ring = kv.budget // page_size - first + -(-max(most, block) // page_size)
        return Footprint(first=first, ring=ring, block=block)
    return Footprint()
