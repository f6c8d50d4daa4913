"""KV policies: which KV a query reads. A policy knows page tables and lengths; nothing of models or sampling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.config.speculation import KVConfig, SnapKVConfig, SpeculationConfig, WindowConfig


class KVPolicy(Protocol):
    """A rule that lists, for the queries at the end of a row, the pages they attend to.

    A policy whose budget covers the context reads exactly what dense attention reads.
    """

    def skipped(self, context: int) -> int:
        """Number of KV slots, in whole pages, that the query at the end of `context` tokens leaves out."""
        ...

    def pages(self, page_table: Tensor, rows: Tensor, contexts: Tensor, width: int) -> Tensor:
        """Page lists of some rows.

        page_table: [max_rows, max_pages] int64. rows: [n] int64 row slots. contexts: [n] int64, tokens up to and
        including each row's first query; later queries of the row skip what the first one skips. width: pages to list.
        Returns [n, width] int64; entries past a row's last token are padding.
        """
        ...


class Dense:
    """Reads everything: the target's own policy."""

    def skipped(self, context: int) -> int:
        return 0

    def pages(self, page_table: Tensor, rows: Tensor, contexts: Tensor, width: int) -> Tensor:
        return page_table[rows, :width]


class Window:
    """Sink + window (StreamingLLM, arXiv 2309.17453) as a view: the first pages and the most recent ones.

    Keys keep their absolute positions, so the view costs a page list and nothing else. The last page counts as full
    towards the budget: a row's first query reads between budget - page_size + 1 and budget slots.

        context of 11 pages, budget of 4:   [0] 1 2 3 4 5 6 7 [8 9 10)
    """

    def __init__(self, *, budget: int, sink: int, page_size: int) -> None:
        """budget: KV tokens, a multiple of page_size. sink: number of first tokens always read, rounded up to pages.

        Raises ValueError if the budget is no multiple of the page size or leaves no page beside the sink.
        """
        self._page_size = page_size
        self._sink = -(-sink // page_size)
        self._width = budget // page_size
        if budget % page_size:
            raise ValueError(f"a budget of {budget} tokens is no whole number of pages of {page_size}")
        if self._width <= self._sink:
            raise ValueError(f"a budget of {budget} tokens leaves no page of {page_size} beside a sink of {sink}")

    def skipped(self, context: int) -> int:
        return max(0, -(-context // self._page_size) - self._width) * self._page_size

    def pages(self, page_table: Tensor, rows: Tensor, contexts: Tensor, width: int) -> Tensor:
        listed = torch.arange(width, device=rows.device)
        skipped = (-(-contexts // self._page_size) - self._width).clamp_(min=0)
        columns = listed + torch.where(listed < self._sink, 0, skipped[:, None])
        return page_table[rows[:, None], columns.clamp_(max=page_table.shape[1] - 1)]


@dataclass(frozen=True, slots=True)
class View:
    """A policy, and the page table that places the KV of each row's positions in a pool.

    page_table: [max_rows, max_pages] int64. One pool can have several views.
    """

    policy: KVPolicy
    page_table: Tensor


def ring_table(max_rows: int, columns: int, first: int, ring: int) -> Tensor:
    """Page table of a pool in which every row slot owns `first` + `ring` pages for good, [max_rows, columns] int64.

        column   0 … first - 1 | first, first + 1, first + 2 …
        page     0 … first - 1 | first + (column - first) % ring        (the row's own)

    A request of any length fits, read through a window of at most `ring` recent pages.
    """
    column = torch.arange(columns)
    page = torch.where(column < first, column, first + (column - first) % ring)
    return torch.arange(max_rows)[:, None] * (first + ring) + page


def make_policy(config: KVConfig, page_size: int) -> KVPolicy:
    """The page lists of a `speculation.kv` setting.

    SnapKV's are those of a window over its cache, whose sink is the tokens it chose: see
    engine.speculation.draft_cache.
    """
    if isinstance(config, WindowConfig):
        return Window(budget=config.budget, sink=config.sink, page_size=page_size)
    if isinstance(config, SnapKVConfig):
        return Window(budget=config.budget, sink=config.budget - config.recent, page_size=page_size)
    return Dense()


def budget_policies(speculation: SpeculationConfig, page_size: int) -> dict[int, WindowConfig]:
    """Policies that drafts may read with, by budget, the largest first, where the budget can change from round to
    round.

    A window is a page list into a pool that holds more (the target's, or a draft model's own) and costs nothing to
    narrow: the configured budget, half of it and a quarter, as far as pages and sink allow.

    Empty for the others, which have one budget. SnapKV's cache is filled for its budget: fewer recent pages would save
    little, and the chosen tokens are not ranked. topk reads all keys whatever it attends to; all has no budget.
    """
    kv = speculation.kv
    if speculation.gamma != "auto" or not isinstance(kv, WindowConfig):
        return {}
    smallest = (-(-kv.sink // page_size) + 1) * page_size
    budgets = [kv.budget // share // page_size * page_size for share in (1, 2, 4)]
    return {budget: kv.model_copy(update={"budget": budget}) for budget in budgets if budget >= smallest}
