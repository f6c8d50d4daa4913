"""KV policies: rules that select the KV a query reads. They depend on page tables and lengths, not on models or
sampling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.config.speculation import KVConfig, SnapKVConfig, SpeculationConfig, WindowConfig

Count = TypeVar("Count", int, npt.NDArray[np.int64])


class KVPolicy(Protocol):
    """A rule that lists, for the queries at the end of a row, the pages they attend to.

    A policy whose budget covers the context reads exactly what dense attention reads.
    """

    def skipped(self, context: Count) -> Count:
        """Number of KV slots, in whole pages, that the query at the end of `context` tokens leaves out; of each, for an
        array."""
        ...

    def leading(self, context: Count) -> Count:
        """Number of first KV slots that the query at the end of `context` tokens reads before the first one it leaves
        out; of each, for an array. Rows with the same first pages list them alike up to there."""
        ...

    def pages(self, page_table: Tensor, rows: Tensor, contexts: Tensor, width: int) -> Tensor:
        """List the pages that rows attend to.

        page_table: [max_rows, max_pages] int64. rows: [n] int64 row slots. contexts: [n] int64, tokens up to and
        including each row's first query; later queries of the row skip the same pages. width: number of pages to list.
        Returns [n, width] int64; entries past a row's last token are padding.
        """
        ...


class Dense:
    """Policy of the target: reads all KV."""

    def skipped(self, context: Count) -> Count:
        return context * 0

    def leading(self, context: Count) -> Count:
        return context

    def pages(self, page_table: Tensor, rows: Tensor, contexts: Tensor, width: int) -> Tensor:
        return page_table[rows, :width]


class Window:
    """Sink + window (StreamingLLM, arXiv 2309.17453) as a view: the first pages and the most recent ones.

    Keys keep their absolute positions, so the view costs only a page list. The last page counts as full towards the
    budget: a row's first query reads between budget - page_size + 1 and budget slots.

        context of 11 pages, budget of 4:   [0] 1 2 3 4 5 6 7 [8 9 10)
    """

    def __init__(self, *, budget: int, sink: int, page_size: int) -> None:
        """budget: KV tokens, a multiple of page_size. sink: number of first tokens always read, rounded up to pages.

        Raises ValueError if the budget is not a multiple of the page size or leaves no page after the sink.
        """
        self._page_size = page_size
        self._sink = -(-sink // page_size)
        self._width = budget // page_size
        if budget % page_size:
            raise ValueError(f"a budget of {budget} tokens is not a multiple of the page size, {page_size}")
        if self._width <= self._sink:
            raise ValueError(f"a budget of {budget} tokens leaves no page of {page_size} beside a sink of {sink}")

    def skipped(self, context: Count) -> Count:
        pages = -(-context // self._page_size) - self._width
        skipped: Count = pages * (pages > 0) * self._page_size
        return skipped

    def leading(self, context: Count) -> Count:
        left_out = self.skipped(context) > 0
        leading: Count = left_out * (self._sink * self._page_size) + (1 - left_out) * context
        return leading

    def pages(self, page_table: Tensor, rows: Tensor, contexts: Tensor, width: int) -> Tensor:
        listed = torch.arange(width, device=rows.device)
        skipped = (-(-contexts // self._page_size) - self._width).clamp_(min=0)
        columns = listed + torch.where(listed < self._sink, 0, skipped[:, None])
        return page_table[rows[:, None], columns.clamp_(max=page_table.shape[1] - 1)]


@dataclass(frozen=True, slots=True)
class View:
    """A policy, and the page table that locates the KV of each row's positions in a pool.

    page_table: [max_rows, max_pages] int64. One pool can have several views.
    """

    policy: KVPolicy
    page_table: Tensor


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


def make_policy(config: KVConfig, page_size: int) -> KVPolicy:
    """Make the policy of a `speculation.kv` setting.

    SnapKV's is a window over its cache, whose sink is the tokens it chose: see engine.speculation.draft_cache. topk and
    all list every page.
    """
    if isinstance(config, WindowConfig):
        return Window(budget=config.budget, sink=config.sink, page_size=page_size)
    if isinstance(config, SnapKVConfig):
        return Window(budget=config.budget, sink=config.budget - config.recent, page_size=page_size)
    return Dense()


def max_listed_pages(config: KVConfig, page_size: int, max_pages: int) -> int:
    """Return the largest number of pages in a draft's list. max_pages: of a row. Two tokens can follow a window's last
    page."""
    return min(max_pages, config.budget // page_size + 1) if config.budget else max_pages


def budget_policies(speculation: SpeculationConfig, page_size: int) -> dict[int, WindowConfig]:
    """Return the policies that drafts may read with, by budget, largest first, if the budget can change between rounds.

    A window is a page list into a pool that holds more (the target's, or a draft model's own), so narrowing it costs
    nothing: its budgets are the configured one, half of it and a quarter, as far as pages and sink allow.

    Empty for the other policies, which have one budget, and for a fixed gamma. SnapKV's cache is filled for its budget:
    fewer recent pages would save little, and the chosen tokens are not ranked. topk reads all keys whatever its budget;
    all has no budget.
    """
    kv = speculation.kv
    if speculation.gamma != "auto" or not isinstance(kv, WindowConfig):
        return {}
    smallest = (-(-kv.sink // page_size) + 1) * page_size
    budgets = [kv.budget // share // page_size * page_size for share in (1, 2, 4)]
    return {budget: kv.model_copy(update={"budget": budget}) for budget in budgets if budget >= smallest}
