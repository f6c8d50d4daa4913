"""Drafts that read the pages whose keys may have the largest products with their query (Quest, arXiv 2406.10774).

The element-wise minimum and maximum of each page's keys are kept beside the pool. From these two follows an upper bound
of a query's products with the page's keys, and the pages with the largest bounds are read. Choosing reads 2 / page_size
of what all keys have, so it is done once in a few steps (LServe, arXiv 2502.14866).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from engine.batch.forward_graphs import GraphWatch
from engine.batch.round_batch import RoundBatch
from engine.batch.view import View
from engine.config.kv import QuestConfig
from engine.kv.page_choice import ChoiceView, ListLayout, PageChoice, pages_of
from engine.kv.policy import DraftSite, KVPolicy, views_by_budget
from engine.plan import RowStart
from kernels.attention.base import AttentionBackend, AttentionBatch, Ballot, GraphAttention, GraphBatch, SharedPrefix
from kernels.key_summaries import KeySummaries
from kernels.kv.kv_pool import KVPool, LayerKV
from kernels.ragged import Ints
from kernels.transfer import send_all


class QuestPolicy(KVPolicy):
    """A view of all KV, of pages that each round's first query chooses per KV head, and a later one again after
    `interval` steps."""

    captures = False

    def __init__(self, site: DraftSite, config: QuestConfig) -> None:
        super().__init__(site)
        page = site.page_size
        summaries = site.summaries or KeySummaries(self.full, site.model.ops)
        self._choice = PageChoice(
            site.page_table, page, site.model, count=config.budget // page, sink=-(-config.sink // page), per_head=True
        )
        self._summariser = PageSummariser(summaries, page)
        if site.summaries is None:
            self.observer = self._summariser
        self.attention: QuestAttention = QuestAttention(site.attention(), self._choice, summaries, config.interval)
        self._state = site.state
        self._views = views_by_budget(
            site,
            config.budget,
            lambda budget: QuestView(self._choice, budget // page, site.first_page, site.sliding, self.attention),
        )

    def view(self, budget: int) -> View:
        return self._views[budget]

    def start(self, start: RowStart) -> None:
        self._choice.clear(start.row)

    def prepare(self, batch: RoundBatch, end: Ints) -> None:
        """See KVPolicy.prepare. The first draft step chooses from the full pages before `end`."""
        rows, ends = batch.row[: batch.num_drafting], end // self._state.page_size
        self._choice.ends[rows] = ends
        row_index, device_ends = send_all(self._state.device, rows, ends)
        self._choice.device_ends[row_index] = device_ends
        self.attention.begin(int(ends.max()))

    def keep_drafts(self, rows: Ints, first: Ints, end: Ints) -> None:
        """See KVPolicy.keep_drafts. Their KV is in its place already; their pages are summarised."""
        index, columns = pages_of(first, end, self._state.page_size)
        row_index, column = send_all(self._state.device, rows[index], columns)
        self._summariser.summarise(self.full, self._choice.page_table[row_index, column])


class QuestView(ChoiceView):
    """View of pages that attention chooses while it runs."""

    def __init__(
        self, choice: PageChoice, count: int, first_page: int, sliding: View | None, attention: QuestAttention
    ) -> None:
        super().__init__(choice, count, first_page, sliding)
        self._attention = attention

    def pages(self, rows: Tensor, contexts: Tensor, width: int) -> Tensor:
        """See View.pages. Lists of layers that choose in this forward are filled when they do."""
        layout = self.layout(rows, width)
        self._attention.expect(rows, layout)
        return layout.fill(self._choice.pages[:, rows])


class QuestAttention:
    """Attention of draft steps, which chooses pages and reads them.

    Each forward follows a call of QuestView.pages, whose lists it reads.
    """

    def __init__(self, inner: AttentionBackend, choice: PageChoice, summaries: KeySummaries, interval: int) -> None:
        """inner: reads what is listed. interval: number of steps that read the same choice."""
        self._inner, self._choice, self._summaries, self._interval = inner, choice, summaries, interval
        self._step = self._width = 0
        self._rows: Tensor
        self._layout: ListLayout
        self._batch: AttentionBatch
        self._candidates: _Candidates | None = None

    def begin(self, width: int) -> None:
        """Begin a round: its first step chooses. width: largest number of pages that a row chooses from."""
        self._step, self._width = 0, width

    def expect(self, rows: Tensor, layout: ListLayout) -> None:
        """Prepare for a step over these row slots, [n], whose lists have this layout."""
        self._rows, self._layout = rows, layout

    def plan(self, batch: AttentionBatch) -> None:
        chooses, self._step = self._step % self._interval == 0, self._step + 1
        self._candidates = None
        if chooses and self._width:
            choice, rows = self._choice, self._rows
            (last,) = send_all(rows.device, np.cumsum(batch.query_lengths) - 1)
            self._candidates = _Candidates(last, choice.page_table[rows, : self._width], choice.device_ends[rows])
            batch = replace(batch, late=True)
        self._batch = batch
        self._inner.plan(batch)

    def run(self, layer: LayerKV, q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """See PlannedAttention.run."""
        if self._candidates is not None:
            self._choose(layer, q[self._candidates.queries], self._candidates)
        return self._inner.run(layer, q, scale)

    def _choose(self, layer: LayerKV, q: Tensor, candidates: _Candidates) -> None:
        """Choose for a layer, and fill in its lists. q: [n, heads, head_dim]."""
        choice, lists = self._choice, self._batch.pages[layer.index]
        count = min(choice.count, self._width)
        chosen = choice.pages[layer.index, self._rows]
        chosen[..., :count] = self._summaries.best(layer, q, candidates.pages, choice.sink, candidates.ends, count)
        choice.pages[layer.index, self._rows] = chosen
        lists.copy_(self._layout.fill(chosen))


@dataclass(frozen=True, slots=True)
class _Candidates:
    """What a step chooses from. queries: [n], index of each row's last query. pages: [n, width], the row's first ones.
    ends: [n], how many of them."""

    queries: Tensor
    pages: Tensor
    ends: Tensor


class PageSummariser:
    """Observer that summarises the pages to which forwards write.

    A page is summarised whenever something is written to it, so that the summary of a full page of committed tokens is
    right, whoever wrote it first: pages that other rows share need nothing more.
    """

    def __init__(self, summaries: KeySummaries, page_size: int) -> None:
        self._summaries, self._page_size = summaries, page_size

    due = True

    def in_graph(self, rows: int, queries: int, width: int) -> GraphWatch:
        """See Observer.in_graph."""
        return _GraphSummaries(self._summaries, self._page_size)

    def around(self, attention: AttentionBackend) -> AttentionBackend:
        """See Observer.around."""
        return _Summarising(attention, self._summaries, self._page_size)

    def summarise(self, pool: KVPool, pages: Tensor) -> None:
        """Summarise pages to which a forward without observer wrote. pages: [n] int64."""
        for index in range(pool.num_layers):
            self._summaries.update(pool.layer(index), pages)


class _Summarising:
    """Attention of one forward."""

    def __init__(self, inner: AttentionBackend, summaries: KeySummaries, page_size: int) -> None:
        self._inner, self._summaries, self._page_size = inner, summaries, page_size
        self._written: Tensor

    def plan(self, batch: AttentionBatch) -> None:
        lengths, queries = np.array(batch.kv_lengths), np.array(batch.query_lengths)
        row_index, columns = send_all(batch.pages.device, *pages_of(lengths - queries, lengths, self._page_size))
        self._written = batch.pages[row_index, columns]
        self._inner.plan(batch)

    def run(self, layer: LayerKV, q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """See PlannedAttention.run."""
        self._summaries.update(layer, self._written)
        return self._inner.run(layer, q, scale)


class _GraphSummaries:
    """Summaries in captured forwards."""

    ballot: Ballot | None = None

    def __init__(self, summaries: KeySummaries, page_size: int) -> None:
        self._summaries, self._page_size = summaries, page_size

    def copy(self) -> None:
        """Do nothing: all that changes are page lists and lengths, which attention reads too."""

    def around(self, attention: GraphAttention, batch: GraphBatch) -> GraphAttention:
        """See GraphWatch.around."""
        return _CapturedSummarising(attention, batch, self._summaries, self._page_size)


class _CapturedSummarising:
    """Attention of a captured forward. It summarises the last pages of each row, as many as its room for queries can
    reach; a page that is full already gets the same summary again."""

    def __init__(self, inner: GraphAttention, batch: GraphBatch, summaries: KeySummaries, page_size: int) -> None:
        self._inner, self._batch, self._summaries, self._page_size = inner, batch, summaries, page_size

    def plan(self, kv_lengths: Sequence[int], prefixes: Sequence[SharedPrefix] = ()) -> None:
        self._inner.plan(kv_lengths, prefixes)

    def run(self, layer: LayerKV, q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """See PlannedAttention.run."""
        batch = self._batch
        last = (batch.lengths - 1) // self._page_size
        behind = torch.arange((batch.queries - 1) // self._page_size + 2, device=last.device)
        written = batch.pages.gather(1, (last[:, None] - behind).clamp_(min=0))
        self._summaries.update(layer, written.flatten())
        return self._inner.run(layer, q, scale)
