"""KV policies: rules that select the KV that drafts read, one per file of this folder (engine.kv.registry)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.batch.forward_graphs import Observer
from engine.batch.round_batch import RoundBatch
from engine.batch.row_state import RowState
from engine.batch.runner import make_attention
from engine.batch.view import DenseView, View
from engine.config.speculation import SpeculationConfig
from engine.plan import RowStart
from kernels.attention.base import AttentionBackend
from kernels.key_summaries import KeySummaries
from kernels.kv.kv_pool import KVPool
from kernels.ragged import Ints
from models.decoder import DecoderModel


@dataclass(frozen=True, slots=True)
class DraftSite:
    """Place of a policy on one rank.

    settings: what drafts read with. model: the one whose KV they read: the target, or a draft model. make_full: makes
    the pool of the KV of all its tokens, laid out by `page_table`; the target's is there already. summaries: of that
    pool, where the target's attention keeps them.
    """

    settings: SpeculationConfig
    model: DecoderModel
    state: RowState
    make_full: Callable[[], KVPool]
    summaries: KeySummaries | None = None

    @property
    def page_table(self) -> Tensor:
        """Pages of rows in the full pool. A draft model seals none of its own."""
        return self.state.sealed_table if self.settings.drafting_model == "model" else self.state.page_table

    @property
    def first_page(self) -> int:
        """See View.first_page, of views of that pool."""
        return 0 if self.settings.drafting_model == "model" else self.state.first_exact

    @property
    def sliding(self) -> View | None:
        """See View.sliding, of views that read the window as the target does."""
        return self.state.windows if self.model.num_sliding_layers else None

    @property
    def page_size(self) -> int:
        return self.state.page_size

    @property
    def max_rows(self) -> int:
        return len(self.state.tokens)

    def attention(self) -> AttentionBackend:
        """Make attention that reads what is listed."""
        return make_attention(self.model, self.page_size)


class KVPolicy:
    """Rule that selects the KV that drafts read. This one is that of a view, which keeps nothing; others override what
    differs.

    full, full_view, full_attention: of forwards that compute committed tokens. pool, attention: of drafts, which write
    to this pool and read from it through `view`. observer: watches forwards over `full`; None: it learns nothing from
    them. captures: whether graphs can capture `attention`. block: largest number of tokens of one row that a forward
    over `full` may compute; None: no limit.

    A policy whose budget covers the context lists exactly what the target reads. Whatever it lists, drafts never change
    the text.
    """

    observer: Observer | None = None
    captures = True
    block: int | None = None

    def __init__(self, site: DraftSite) -> None:
        self.full = site.make_full()
        self.pool = self.full.drafting()
        self.full_view: View = DenseView(
            site.page_table, site.first_page, window=site.model.window, sliding=site.sliding
        )
        self.attention = self.full_attention = site.attention()

    def view(self, budget: int) -> View:
        """Return the view of drafts. budget: one of KVSettings.budgets; 0: the configured one."""
        return self.full_view

    def start(self, start: RowStart) -> None:
        """Start a request in a row slot."""

    def watch(self, rows: Ints, first: Ints, queries: Ints, drafts: Ints) -> None:
        """Prepare for the next forward over `full`, which computes `queries[i]` tokens of row slot `rows[i]` from
        position `first[i]`, the last `drafts[i]` of them not committed."""

    def prepare(self, batch: RoundBatch, end: Ints) -> None:
        """Bring the rows that are about to draft up to date.

        end: [drafting rows], number of positions that `full` holds. A row that lacks some before its pending token
        computes them in its first draft step.
        """

    def keep_drafts(self, rows: Ints, first: Ints, end: Ints) -> None:
        """Keep the KV of positions first … end - 1 of each row slot, which drafts have just written to `pool`, for a
        model that has no other KV of them."""


def views_by_budget(site: DraftSite, budget: int, make: Callable[[int], View]) -> dict[int, View]:
    """Make the view of each budget that a round may ask for; 0: `budget`, the configured one.

    make: makes the view of a budget.
    """
    views = {each: make(each) for each in (budget, *site.settings.kv_budgets(site.page_size))}
    return views | {0: views[budget]}


def ring_table(max_rows: int, columns: int, first: int, ring: int) -> Tensor:
    """Build the page table of a pool in which every row slot permanently owns `first` + `ring` pages.

        column   0 … first - 1 | first, first + 1, first + 2 …
        page     0 … first - 1 | first + (column - first) % ring        (the row's own)

    A request of any length fits, read through a window of at most `ring` recent pages. Returns [max_rows, columns]
    int64.
    """
    column = torch.arange(columns)
    page = torch.where(column < first, column, first + (column - first) % ring)
    return torch.arange(max_rows)[:, None] * (first + ring) + page
