"""Sink + window (StreamingLLM, arXiv 2309.17453): the first pages and the most recent ones."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from engine.batch.view import View
from engine.config.kv import WindowConfig
from engine.kv.policy import DraftSite, KVPolicy, ring_table, views_by_budget
from kernels.attention.relative import RelativeAttention
from kernels.ragged import Ints


class WindowView:
    """The first pages of a row and the most recent ones.

    Keys keep their absolute positions, so the view costs only a page list. The last page counts as full towards the
    budget: a row's first query reads between budget - page_size + 1 and budget slots.

        context of 11 pages, budget of 4:   [0] 1 2 3 4 5 6 7 [8 9 10)
    """

    per_layer = False

    def __init__(
        self,
        page_table: Tensor,
        *,
        budget: int,
        sink: int,
        page_size: int,
        first_page: int = 0,
        shares: bool = True,
        window: int = 0,
        kept: int | None = None,
        sliding: View | None = None,
    ) -> None:
        """budget: KV tokens, a multiple of page_size. sink: number of first tokens always read, rounded up to pages.
        first_page, shares, window, sliding: see View. kept: largest context that still has its first tokens; None: all
        have. Longer ones read recent tokens in place of the sink.

        Raises ValueError if the budget is not a multiple of the page size or leaves no page after the sink.
        """
        self.page_table, self.first_page, self.shares = page_table, first_page, shares
        self.window, self.sliding, self._kept = window, sliding, kept
        self._page_size = page_size
        self._sink = -(-sink // page_size)
        self._width = budget // page_size
        if budget % page_size:
            raise ValueError(f"a budget of {budget} tokens is not a multiple of the page size, {page_size}")
        if self._width <= self._sink:
            raise ValueError(f"a budget of {budget} tokens leaves no page of {page_size} beside a sink of {sink}")

    def skipped(self, rows: Ints, contexts: Ints) -> Ints:
        pages = -(-contexts // self._page_size) - self._width
        skipped: Ints = pages * (pages > 0) * self._page_size
        return skipped

    def leading(self, rows: Ints, contexts: Ints) -> Ints:
        left_out = self.skipped(rows, contexts) > 0
        leading: Ints = left_out * (self._sink * self._page_size) + (1 - left_out) * contexts
        return leading

    def pages(self, rows: Tensor, contexts: Tensor, width: int) -> Tensor:
        listed = torch.arange(width, device=rows.device)
        skipped = (-(-contexts // self._page_size) - self._width).clamp_(min=0)
        leading = listed < self._sink
        if self._kept is not None:
            leading = leading & (contexts <= self._kept)[:, None]
        columns = listed + torch.where(leading, 0, skipped[:, None])
        return self.page_table[rows[:, None], columns.clamp_(max=self.page_table.shape[1] - 1)]


class WindowPolicy(KVPolicy):
    """A view of the target's pool; for a draft model, of a pool that holds only what the window reads, as a ring."""

    def __init__(self, site: DraftSite, config: WindowConfig) -> None:
        page, table, own = site.page_size, site.page_table, site.settings.drafting_model == "model"
        if own:
            kept = site.settings.kv_state(page)
            table = ring_table(site.max_rows, table.shape[1], kept.first, kept.ring).to(site.state.device)
            pool = site.model.make_pool(site.max_rows * kept.pages, page)
            site = replace(site, make_full=lambda: pool)
            self.block = kept.block
        super().__init__(site)
        self._views = views_by_budget(
            site,
            config.budget,
            lambda budget: WindowView(
                table,
                budget=budget,
                sink=config.sink,
                page_size=page,
                first_page=0 if own else site.first_page,
                shares=not own,
                window=0 if config.positions == "relative" else site.model.window,
                sliding=_sliding_view(site, budget, config.sink),
            ),
        )
        if config.positions == "relative":
            self.captures, rotary = False, site.model.rotary
            assert rotary is not None, "relative positions need one rotary embedding for all layers"
            self.attention = RelativeAttention(
                site.attention(),
                site.attention(),
                page_size=page,
                sink_pages=-(-config.sink // page),
                rotary=rotary,
                merge=site.model.ops.merge,
            )
        if own:
            self.full_view, self.full_attention = self._views[0], self.attention

    def view(self, budget: int) -> View:
        return self._views[budget]


def _sliding_view(site: DraftSite, budget: int, sink: int) -> View | None:
    """Make the view of the same budget of sliding layers; the target's, if that has room for their window."""
    window = site.model.sliding_window
    if budget >= window:
        return site.sliding
    table, page = site.state.sliding_table, site.page_size
    return WindowView(table, budget=budget, sink=sink, page_size=page, shares=False, window=window, kept=window)
