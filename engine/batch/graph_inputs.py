"""Inputs of captured forwards, at fixed addresses, into which the inputs of each replay are copied."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels.attention.base import AttentionBatch, GraphBatch
from kernels.kv.kv_pool import KVPool
from kernels.ragged import Ints, ragged_arange
from kernels.transfer import send_all
from models.batch import ForwardBatch, TokenInputs


def pages_seen(window: int, queries: int, page_size: int) -> int:
    """Return the largest number of pages that a row's queries see.

    They see window + queries - 1 slots, the first of which may be the last one of its page.
    """
    return (window + queries - 3) // page_size + 2


class SlidingRoom(NamedTuple):
    """Room of captured forwards for sliding layers. pool: of these layers, with a scratch page. window: see
    AttentionBatch. width: largest number of pages of a row."""

    pool: KVPool
    window: int
    width: int


class GraphRows(NamedTuple):
    """Inputs of some rows of a captured forward. tokens: [rows * queries]. batch: what they read. sliding: what they
    read in sliding layers; None: the model has none."""

    tokens: TokenInputs
    batch: GraphBatch
    sliding: GraphBatch | None


class GraphInputs:
    """Inputs of captured forwards: for a number of rows, with room for queries of each.

    A row's queries are the last ones of its room, and those before them padding: so a row's last query is always at the
    same place. Padding, like rows that are missing, writes to the scratch page of each pool, which no request owns.

    kv_lengths, sliding_kv_lengths: host, [rows], lengths of the lists of the next replay; the second are of sliding
    layers, and empty without any.
    """

    def __init__(
        self,
        pool: KVPool,
        *,
        rows: int,
        queries: int,
        width: int,
        prefixes: int = 0,
        layers: int = 0,
        window: int = 0,
        sliding: SlidingRoom | None = None,
    ) -> None:
        """width: largest number of pages in a list. pool: has a scratch page. prefixes: room for prefixes that rows
        share. layers: number of lists that each row has, one per layer; 0: one for all.
        window: see AttentionBatch. sliding: room for sliding layers; None: the model has none."""
        device = pool.device
        self._queries = queries
        padding = [0, 0, _scratch_slot(pool)]  # token id, position, KV slot
        lists = [layers] * (layers > 0) + [rows]
        self._lists = _GroupLists(pool, lists, width, queries, prefixes=prefixes, per_layer=layers > 0, window=window)
        self._sliding: _GroupLists | None = None
        if sliding is not None:
            padding.append(_scratch_slot(sliding.pool))
            self._sliding = _GroupLists(sliding.pool, [rows], sliding.width, queries, window=sliding.window)
        self._padding = torch.tensor(padding, device=device)[:, None]
        self._tokens = self._padding.repeat(1, rows * queries)

    @property
    def kv_lengths(self) -> list[int]:
        return self._lists.kv_lengths

    @property
    def sliding_kv_lengths(self) -> list[int]:
        return [] if self._sliding is None else self._sliding.kv_lengths

    def part(self, first: int, rows: int) -> GraphRows:
        """Return the inputs of `rows` rows from `first` on."""
        tokens = self._tokens[:, first * self._queries : (first + rows) * self._queries]
        sliding = None if self._sliding is None else self._sliding.part(first, rows)
        return GraphRows(TokenInputs(*tokens), self._lists.part(first, rows), sliding)

    def fits(self, inputs: ForwardBatch) -> bool:
        return max(inputs.attention.query_lengths) <= self._queries

    def copy(self, inputs: ForwardBatch, rows: Ints) -> Tensor:
        """Copy in the inputs of the next replay. rows: [rows of `inputs`], places of their rows here. Returns the place
        of each query, [tokens] int64."""
        groups, tokens = [(self._lists, inputs.attention)], [inputs.token_ids, inputs.positions, inputs.slots]
        if self._sliding is not None:
            assert inputs.sliding_attention is not None
            assert inputs.sliding_slots is not None
            groups.append((self._sliding, inputs.sliding_attention))
            tokens.append(inputs.sliding_slots)
        counts = np.array(inputs.attention.query_lengths, dtype=np.int64)
        places = np.repeat((rows + 1) * self._queries - counts, counts) + ragged_arange(counts)
        measured = [numbers for lists, batch in groups for numbers in lists.measure(batch, rows)]
        place, row, *numbers = send_all(self._tokens.device, places, rows, *measured)
        self._tokens.copy_(self._padding)
        self._tokens[:, place] = torch.stack(tokens)
        for index, (lists, batch) in enumerate(groups):
            lists.enter(batch.pages, row, *numbers[2 * index : 2 * index + 2])
        return place


class _GroupLists:
    """What rows read in one group of layers: lists of pages, and their lengths.

    With a window, a list begins with the page of the first slot that a query of its row sees, so that its width does
    not depend on the context.
    """

    def __init__(
        self,
        pool: KVPool,
        lists: list[int],
        width: int,
        queries: int,
        *,
        prefixes: int = 0,
        per_layer: bool = False,
        window: int = 0,
    ) -> None:
        """lists: sizes of all dimensions of the lists but the last one. width: largest number of pages in a list.
        queries, prefixes, per_layer, window: see GraphBatch."""
        assert pool.scratch is not None
        self._page_size, self._queries, self._prefixes = pool.page_size, queries, prefixes
        self._per_layer, self._window = per_layer, window
        if window:
            width = min(width, pages_seen(window, queries, pool.page_size))
        rows = lists[int(per_layer)]
        self._pages = torch.full([*lists, width], pool.scratch, device=pool.device)
        self._lengths = torch.ones(rows, dtype=torch.int64, device=pool.device)
        self.kv_lengths = [1] * rows

    def part(self, first: int, rows: int) -> GraphBatch:
        pages = self._pages.narrow(int(self._per_layer), first, rows)
        lengths = self._lengths[first : first + rows]
        return GraphBatch(self._queries, pages, lengths, self._prefixes, self._per_layer, window=self._window)

    def measure(self, batch: AttentionBatch, rows: Ints) -> tuple[Ints, Ints]:
        """Set `kv_lengths` to those of the next replay. Returns them, [rows here], and the number of first pages that
        each list leaves out, [rows of the batch]."""
        assert batch.per_layer == self._per_layer
        assert batch.window == self._window
        own = np.array(batch.kv_lengths, dtype=np.int64)
        skipped = np.zeros_like(own)
        if self._window:
            seen = own - batch.query_lengths + 1  # up to and including a row's first query
            skipped = np.maximum(seen - self._window, 0) // self._page_size
            own -= skipped * self._page_size
        lengths = np.ones(len(self.kv_lengths), dtype=np.int64)
        lengths[rows] = own
        self.kv_lengths = lengths.tolist()
        return lengths, skipped

    def enter(self, pages: Tensor, row: Tensor, lengths: Tensor, skipped: Tensor) -> None:
        """Copy in lists and lengths. pages: as in AttentionBatch. row: [rows of the batch], their places here. lengths,
        skipped: of `measure`, on the device."""
        if self._window:
            columns = torch.arange(self._pages.shape[-1], device=pages.device) + skipped[:, None]
            pages = pages.gather(1, columns.clamp_(max=pages.shape[1] - 1))
        mine = (slice(None), row) if self._per_layer else (row,)
        self._pages[(*mine, ..., slice(pages.shape[-1]))] = pages
        self._lengths.copy_(lengths)


def _scratch_slot(pool: KVPool) -> int:
    """Return the first slot of a pool's scratch page, counted as slots of tokens are."""
    assert pool.scratch is not None
    return (pool.scratch - pool.first_exact) * pool.page_size
