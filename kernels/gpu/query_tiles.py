"""Tiles of a batch: its queries, assigned to programs of the attention kernel.

Where rows share pages, tiles are laid out on the host: of the prefixes, and of what follows them in each row. All are
programs of one launch, whose results the merge of spans combines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import triton
from torch import Tensor

from kernels.attention.base import SharedPrefix
from kernels.attention.shared_reading import first_segment
from kernels.ragged import Ints, offsets, ragged_arange
from kernels.transfer import send

_MIN_PACKED = 32
"""Smallest number of queries times heads per KV head in a tile. Tiles of one prefix read the same keys, from the L2
cache but for the first one: larger ones read them less often. From 64 on, only one program fits a multiprocessor, and
rows of one query, which are in tiles of the same size, would have half as many loads under way."""


@dataclass(frozen=True, slots=True)
class PrefixTiles:
    """Tiles of prefixes, which come before those of the batch's own rows, as prefixes come after these.

    tiles: their number. slots: largest number of slots of a prefix, and of what another row reads. skipped: [rows and
    prefixes] int64, first slots of the list that are not read. listed: [rows and prefixes] int64, row of `pages` whose
    list is read. tokens: [queries] int64, index in the batch of each query that `start` counts from. shares: [tokens of
    the batch] int64, 1 for those that attend to a prefix.
    """

    tiles: int
    slots: tuple[int, int]
    skipped: Tensor
    listed: Tensor
    tokens: Tensor
    shares: Tensor


@dataclass(frozen=True, slots=True)
class Tiles:
    """Assignment of queries to programs; the same for all layers of a forward.

    row: [tiles] int64, the tile's row, or `rows` for an unused tile: shapes alone bound the number of tiles. first:
    [tiles] int64, the tile's first query in its row. start: [rows] int64, a row's first query in the batch. queries,
    lengths: [rows] int64. pages: [rows, width] or [rows, kv_heads, width] int64, with [layers] in front of these where
    per_layer is true. block: queries per tile. prefixes: what else there is to know where pages are shared: some of the
    rows are then prefixes. window: see AttentionBatch.
    """

    row: Tensor
    first: Tensor
    start: Tensor
    queries: Tensor
    lengths: Tensor
    pages: Tensor
    block: int
    prefixes: PrefixTiles | None = None
    per_layer: bool = False
    window: int = 0

    def to(self, device: torch.device) -> Tiles:
        parts = self.row, self.first, self.start, self.queries, self.lengths
        row, first, start, queries, lengths = (send(part, device) for part in parts)
        return replace(self, row=row, first=first, start=start, queries=queries, lengths=lengths)


def queries_per_tile(tokens: int, rows: int) -> int:
    """Choose the queries of a tile: for rows of one query, rows with drafts, chunks of a prompt. A tile that holds all
    queries of a row reads its KV once."""
    return 1 if tokens == rows else 4 if tokens <= 4 * rows else 8 if tokens <= 8 * rows else 16


def assign_tiles(
    queries: Tensor, lengths: Tensor, pages: Tensor, tokens: int, *, uniform: bool = False, per_layer: bool = False
) -> Tiles:
    """Assign queries to tiles without waiting for the device.

    tokens: sum of `queries`, or an upper bound of it. It decides all shapes, together with the number of rows. uniform:
    all rows have tokens / rows queries, so that no tile is unused, and lists are split over all programs. A row may be
    shorter than its queries are many: the first ones see nothing, and get zero with a log-sum-exp of -inf. per_layer:
    whether `pages` has lists of each layer.
    """
    rows = len(queries)
    block = queries_per_tile(tokens, rows)
    needed = (queries + block - 1) // block
    behind = needed.cumsum(0)
    most = rows * triton.cdiv(tokens // rows, block) if uniform else tokens // block + rows if block > 1 else rows
    tile = torch.arange(most, device=queries.device)
    row = torch.searchsorted(behind, tile, right=True)
    inside = row.clamp(max=rows - 1)
    first = (tile - (behind - needed)[inside]) * block
    return Tiles(row, first, queries.cumsum(0) - queries, queries, lengths, pages, block, per_layer=per_layer)


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
