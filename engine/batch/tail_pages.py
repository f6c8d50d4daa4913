"""Exact pages of rows, where pages of committed tokens are sealed.

A group is as many positions as a page has. A position attends to its own group exactly, and to earlier ones as they are
sealed: that depends on positions alone, so neither drafts, chunks nor prefix hits change what a token's query reads.
The tokens of a group are written to an exact page, which the row holds while later positions of the group may come, and
then for one more group, for its drafts.

    position   0 … 63     64 … 127   128 … 150
    target     sealed     sealed     exact         (as position 150 reads it)
    drafts     sealed     exact      exact
"""

from __future__ import annotations

from collections.abc import Iterable
from heapq import heappop, heappush

import numpy as np

from engine.config.deployment import EngineConfig
from engine.plan import RoundPlan
from kernels.kv.kv_bits import EXACT_PAGES
from kernels.ragged import Ints


class TailPages:
    """Owner of a rank's exact pages. All ranks decide alike: by the plan.

    held: per row slot, exact pages by group.
    """

    def __init__(self, max_rows: int, num_pages: int, page_size: int) -> None:
        """num_pages: see num_exact_pages."""
        self._page_size = page_size
        self.held: list[dict[int, int]] = [{} for _ in range(max_rows)]
        self._free = list(range(num_pages))  # a heap: the smallest is held next, whatever was held before
        self._plan: RoundPlan | None = None  # that was applied last
        self._ends: dict[int, int] = {}  # of the latest round, by row slot: tokens that were committed at least

    def drop(self, row: int) -> None:
        """Free the pages of a row slot, whose request is another one from now on."""
        self._release(row, list(self.held[row]))
        self._ends.pop(row, None)

    def update(self, plan: RoundPlan) -> tuple[Ints, Ints]:
        """Hold a page for each group that the plan's rows write to. Returns the row slot and the group of pages that
        are not held any more, [n] each."""
        self._plan = plan
        page, released = self._page_size, []
        written = {
            work.row: range(work.computed // page, (work.computed + work.new + work.gamma - 1) // page + 1)
            for work in plan.work
        }
        # Of a row that writes to several groups, drafts can do without the one before them.
        kept = {row: end // page - 1 for row, end in self._ends.items()}
        kept |= {row: groups.start - (len(groups) == 1) for row, groups in written.items()}
        for row, first in kept.items():
            old = [group for group in self.held[row] if group < first]
            self._release(row, old)
            released += [(row, group) for group in old]
        self._ends = {work.row: work.computed + work.new for work in plan.work}
        for row, new in written.items():
            for group in new:
                if group not in self.held[row]:
                    self.held[row][group] = heappop(self._free)
        rows, groups = np.array(released, dtype=np.int64).reshape(-1, 2).T
        return rows, groups

    def abandon(self, plan: RoundPlan) -> None:
        """Free the pages of the rows of a round that did not finish. Afterwards all ranks hold the same pages, wherever
        in the round they were."""
        if self._plan is not plan:
            for start in plan.starts:
                self.drop(start.row)
            self.update(plan)
        for work in plan.work:
            self.drop(work.row)

    def pages_of(self, rows: Iterable[int]) -> tuple[Ints, Ints, Ints]:
        """List the pages that row slots hold: the row slot, the group and the exact page of each, [n]."""
        held = [(row, group, page) for row in rows for group, page in self.held[row].items()]
        row, group, page = np.array(held, dtype=np.int64).reshape(-1, 3).T
        return row, group, page

    def _release(self, row: int, groups: list[int]) -> None:
        for group in groups:
            heappush(self._free, self.held[row].pop(group))


def num_exact_pages(config: EngineConfig) -> int:
    """Return the number of exact pages that are enough for any round, 0 where no page is sealed. A row holds
    EXACT_PAGES, or as many as its tokens need, which begin and end within a group."""
    if not config.cache.seals:  # tokens stay where they are written
        return 0
    scheduler = config.scheduler
    return EXACT_PAGES * scheduler.max_rows + -(-scheduler.max_batch_tokens // config.cache.page_size)


def make_tails(config: EngineConfig) -> TailPages | None:
    """Make the owner of a rank's exact pages; None where no page is sealed."""
    count = num_exact_pages(config)
    return TailPages(config.scheduler.max_rows, count, config.cache.page_size) if count else None
