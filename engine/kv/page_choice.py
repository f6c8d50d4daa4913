"""Pages that are chosen for each row, and the views that list them with the first pages and all that is newer.

row of 12 pages, sink 1, budget of 3 pages, chosen when it had 10 full pages:

[0] 1 [2] 3 4 [5] 6 7 [8] 9 [10 11)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from engine.batch.view import View
from kernels.ragged import Ints, ragged_arange
from models.decoder import DecoderModel


class PageChoice:
    """Chosen pages of each row slot.

    pages: [layers, max_rows + 1, count] int32, or [layers, max_rows + 1, kv_heads, count]: indices into a row's page
        table, the best first. Of a row with fewer pages to choose from, only that many are valid.
    ends: [max_rows + 1], on the host and on the device: number of a row's pages when they were chosen, all full and
        committed; 0: not yet.
    nobody: the last index, which is that of no row.
    """

    def __init__(
        self, page_table: Tensor, page_size: int, model: DecoderModel, *, count: int, sink: int, per_head: bool
    ) -> None:
        """page_table: [max_rows, max_pages] int64. count: number of pages to choose. sink: number of first pages that
        are always read. per_head: whether each KV head has a choice of its own."""
        self.count, self.sink, self.per_head, self.kv_heads = count, sink, per_head, model.kv_heads
        self.page_table, self.page_size = page_table, page_size
        self.nobody, device = len(page_table), page_table.device
        shape = (model.num_kv_layers, self.nobody + 1, *([model.kv_heads] if per_head else []), count)
        self.pages = torch.zeros(shape, dtype=torch.int32, device=device)
        self.ends = np.zeros(self.nobody + 1, dtype=np.int64)
        self.device_ends = torch.zeros(self.nobody + 1, dtype=torch.int64, device=device)

    def clear(self, row: int) -> None:
        """Forget the choice of a row slot, for its next request."""
        self.ends[row] = 0
        self.device_ends[row].fill_(0)

    def excluded(self, ends: Tensor, width: int) -> Tensor:
        """Return a mask of the pages that cannot be chosen. ends: [n], see above. Returns [n, width] bool."""
        page = torch.arange(width, device=ends.device)
        return (page < self.sink) | (page >= ends[:, None])


class ChoiceView:
    """View of the first pages, of the best chosen ones, and of all that is newer."""

    shares = True
    per_layer = True
    window = 0

    def __init__(self, choice: PageChoice, count: int, first_page: int, sliding: View | None) -> None:
        """count: number of chosen pages to read, at most choice.count. first_page, sliding: see View."""
        self._choice, self._count, self.first_page, self.sliding = choice, count, first_page, sliding
        self.page_table = choice.page_table

    def skipped(self, rows: Ints, contexts: Ints) -> Ints:
        candidates = np.maximum(self._choice.ends[rows] - self._choice.sink, 0)
        skipped: Ints = np.maximum(candidates - self._count, 0) * self._choice.page_size
        return skipped

    def leading(self, rows: Ints, contexts: Ints) -> Ints:
        first = self._choice.sink * self._choice.page_size
        leading: Ints = np.where(self.skipped(rows, contexts) > 0, first, contexts)
        return leading

    def pages(self, rows: Tensor, contexts: Tensor, width: int) -> Tensor:
        return self.layout(rows, width).fill(self._choice.pages[:, rows])

    def layout(self, rows: Tensor, width: int) -> ListLayout:
        """Lay out the lists of rows. rows: [n] row slots. width: number of pages to list."""
        sink = self._choice.sink
        rows = rows[:, None, None] if self._choice.per_head else rows[:, None]
        left_out = (self._choice.device_ends[rows] - sink - self._count).clamp_(min=0)
        return ListLayout.make(
            self.page_table, rows, sink=sink, count=self._count, width=width, left_out=left_out, chooses=left_out > 0
        )


@dataclass(frozen=True, slots=True)
class ListLayout:
    """Layout of the page lists of rows; the same in all layers.

    rows: [n, 1] row slots, with lists per head [n, 1, 1]. own: [n, (1,) width], for each place of a list, the index of
    its page in the row's table if it is none of the chosen ones: in the sink, and where all candidates are read, that
    of the place. is_chosen: [n, (1,) width] bool, places of chosen pages. rank: [width], which chosen one it is there.
    """

    page_table: Tensor
    rows: Tensor
    own: Tensor
    is_chosen: Tensor
    rank: Tensor

    @classmethod
    def make(
        cls, page_table: Tensor, rows: Tensor, *, sink: int, count: int, width: int, left_out: Tensor, chooses: Tensor
    ) -> Self:
        """Lay out lists of the first `sink` pages of rows, of `count` chosen ones, and of those after the choice.

        rows: see above. left_out: [n, (kv_heads,) 1] int64, number of pages that a list leaves out. chooses: the same,
        bool, whether it has chosen pages: those of a list without are the last ones before the end of the choice.
        """
        place = torch.arange(width, device=rows.device)
        own = place + torch.where(place < sink, 0, left_out)
        return cls(
            page_table,
            rows,
            own=own.clamp_(max=page_table.shape[1] - 1),
            is_chosen=(place >= sink) & (place < sink + count) & chooses,
            rank=(place - sink).clamp_(0, count - 1),
        )

    def fill(self, chosen: Tensor) -> Tensor:
        """List the pages. chosen: [(layers,) n, (kv_heads,) count], of these rows. Returns the same, with width instead
        of count."""
        return self.page_table[self.rows, torch.where(self.is_chosen, chosen[..., self.rank], self.own)]


def pages_of(first: Ints, end: Ints, page_size: int) -> tuple[Ints, Ints]:
    """List the pages that hold positions first[i] … end[i] - 1 of each row i. Returns, for each page, its row and its
    place in the row's list."""
    begin = first // page_size
    count = -(-end // page_size) - begin
    return np.repeat(np.arange(len(count)), count), np.repeat(begin, count) + ragged_arange(count)
