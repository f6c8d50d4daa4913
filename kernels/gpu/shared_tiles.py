"""Tiles of a batch whose rows share pages, laid out on the host: of the prefixes, and of what follows them in each row.

All tiles are programs of one launch, whose results the merge of spans combines.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kernels.attention.base import SharedPrefix
from kernels.attention.shared_reading import first_segment
from kernels.gpu.attention import PrefixTiles, Tiles, queries_per_tile
from kernels.ragged import Ints, offsets, ragged_arange

_MIN_PACKED = 32
"""Smallest number of queries times heads per KV head in a tile. Tiles of one prefix read the same keys, from the L2
cache but for the first one: larger ones read them less often. From 64 on, only one program fits a multiprocessor, and
rows of one query, which are in tiles of the same size, would have half as many loads under way."""


def tile_size(tokens: int, rows: int, group: int) -> int:
    """Choose the queries of a tile. group: heads per KV head."""
    return max(queries_per_tile(tokens, rows), _MIN_PACKED // group)


class SharedTiles:
    """Layout of one batch, or of all batches of a capture: equal sizes, at fixed places of one array.

    numbers: [n] int64, all arrays end to end; see `tiles`.
    """

    def __init__(
        self,
        queries: Ints,
        lengths: Ints,
        prefixes: Sequence[SharedPrefix],
        *,
        block: int,
        page_size: int,
        room: int | None = None,
    ) -> None:
        """queries, lengths: [rows]. block: queries per tile. room: number of prefixes, at least that of `prefixes`, for
        which there is a place, with any number of queries; None: there is none to spare."""
        count = len(prefixes) if room is None else room
        rows, tokens = len(queries), int(queries.sum())
        shared = first_segment(prefixes, queries)
        more = count - len(prefixes)
        of_prefixes, first = _cut(shared.queries, block)
        most = len(of_prefixes) if room is None else tokens // block + room
        spare = most - len(of_prefixes)
        spare_tokens = 0 if room is None else tokens - len(shared.tokens)
        of_rows, first_of_rows = _cut(queries, block)
        shares = np.zeros(tokens, dtype=np.int64)
        shares[shared.tokens] = 1
        prefix_slots = shared.pages * page_size
        skipped = shared.skipped * page_size
        self._block, self._tiles = block, most
        self._slots = int(prefix_slots.max(initial=0)), int((lengths - skipped).max())
        parts = [
            np.concatenate([of_prefixes + rows, np.full(spare, rows + count), of_rows]),
            np.concatenate([first, np.zeros(spare, dtype=np.int64), first_of_rows]),
            np.concatenate([offsets(queries)[:-1], tokens + offsets(_pad(shared.queries, more))[:-1]]),
            np.concatenate([queries, _pad(shared.queries, more)]),
            np.concatenate([lengths, _pad(prefix_slots, more)]),
            np.concatenate([skipped, np.zeros(count, dtype=np.int64)]),
            np.concatenate([np.arange(rows), _pad(shared.rows, more)]),
            np.concatenate([np.arange(tokens), _pad(shared.tokens, spare_tokens)]),
            shares,
        ]
        self._sizes = [len(part) for part in parts]
        self.numbers: Ints = np.concatenate(parts)

    def tiles(self, numbers: Tensor, pages: Tensor, max_slots: int | None = None) -> Tiles:
        """Return the tiles. numbers: a copy on the device, which the result refers to. max_slots: largest number of
        slots of any list that the numbers may describe later; None: they do not change."""
        row, first, start, queries, lengths, skipped, listed, order, shares = torch.split(numbers, self._sizes)
        slots = self._slots if max_slots is None else (max_slots, max_slots)
        prefixes = PrefixTiles(self._tiles, slots, skipped, listed, order, shares)
        return Tiles(row, first, start, queries, lengths, pages, self._block, prefixes)


def _cut(queries: Ints, block: int) -> tuple[Ints, Ints]:
    """Return the row and the first query of each tile."""
    needed = -(-queries // block)
    return np.repeat(np.arange(len(queries)), needed), ragged_arange(needed) * block


def _pad(values: Ints, count: int) -> Ints:
    return np.concatenate([values, np.zeros(count, dtype=np.int64)])
