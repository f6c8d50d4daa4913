"""Page lists of groups of queries in each layer, and the attention that reads them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.batch.row_state import RowState
from engine.config.target_reading import TargetQuestConfig
from engine.kv.page_choice import ListLayout
from kernels.attention.base import AttentionBackend, AttentionBatch
from kernels.attention.shared_reading import merge_sinks
from kernels.kv.kv_pool import LayerKV
from kernels.ragged import Ints, ragged_arange
from kernels.transfer import send_all

Bools = npt.NDArray[np.bool_]

_LIST_BYTES = 64 << 20
"""Largest lists that are filled at a time, unless those of one layer are larger. A recomputed answer of thousands of
tokens has hundreds of groups."""


@dataclass(frozen=True, slots=True)
class QueryGroups:
    """Queries that read the same pages, group by group.

    On the host, [groups] each: counts: number of queries. lasts: position of the last one. ends: number of full pages
    before the group's anchor. On the device, [groups] int64 each: rows: row slots. places: places of their choices in
    the ring of the row's.
    """

    counts: Ints
    lasts: Ints
    ends: Ints
    rows: Tensor
    places: Tensor


class GroupAttention:
    """Attention of groups in the layers in which the same KV heads stream.

    Each KV head has its own list. Where some heads of a layer stream, it has its own length too: it is a row of a pool
    with one KV head.
    """

    def __init__(
        self,
        streams: Bools,
        layers: list[int],
        chosen: Tensor,
        state: RowState,
        config: TargetQuestConfig,
        attention: AttentionBackend,
    ) -> None:
        """streams: [kv_heads]. layers: those in which just these stream. chosen: see TargetQuestAttention."""
        page, device = state.page_size, state.device
        self._state, self._chosen, self._attention = state, chosen, attention
        self._kv_heads, self._count = chosen.shape[3:]
        self._sink, self._window = -(-config.sink // page), config.window // page
        self._streams = streams
        self._is_even = bool(streams.all() or not streams.any())
        self.chooses = not streams.all()
        self._layers = torch.tensor(layers, device=device)
        self._index = {layer: index for index, layer in enumerate(layers)}
        self._heads = torch.arange(self._kv_heads, device=device)[:, None]
        self._choosing = torch.from_numpy(np.flatnonzero(~streams)).to(device)
        self._groups: QueryGroups
        self._layout: ListLayout
        self._queries: list[int]
        self._lengths: list[int]
        self._order: Tensor | None = None
        self._late = False
        self._first = 0
        self._lists: Tensor

    def plan(self, groups: QueryGroups, late: bool) -> None:
        """Prepare for a forward. Lists have the choices that are kept. late: whether `write` may replace some."""
        # [groups, heads], in pages; of one head if all skip as many.
        streams = self._streams[:1] if self._is_even else self._streams
        candidates = np.maximum(groups.ends - self._sink, 0)[:, None]
        skipped = np.maximum(candidates - np.where(streams, self._window, self._count), 0)
        lengths = groups.lasts[:, None] + 1 - skipped * self._state.page_size
        queries = np.repeat(groups.counts, streams.size)
        left_out, chooses, order = send_all(
            self._state.device,
            skipped.ravel(),
            (~streams & (skipped > 0)).astype(np.int64).ravel(),
            self._places_of(groups),
        )
        self._order = order if len(order) else None
        self._layout = ListLayout.make(
            self._state.page_table,
            groups.rows[:, None, None],
            sink=self._sink,
            count=self._count,
            width=-(-int(lengths.max()) // self._state.page_size),
            left_out=left_out.view(*skipped.shape, 1),
            chooses=chooses.view(*skipped.shape, 1).bool(),
        )
        self._groups, self._queries, self._lengths = groups, queries.tolist(), lengths.ravel().tolist()
        self._late = late and self.chooses
        self._fill(0)

    def _places_of(self, groups: QueryGroups) -> Ints:
        """Return the place, among the groups' queries by KV head, of each query of each row of a pool with one KV head;
        empty if they are in order."""
        if self._is_even or groups.counts.max() == 1:
            return np.empty(0, dtype=np.int64)
        first = np.repeat(groups.counts.cumsum() - groups.counts, self._kv_heads)
        head = np.tile(np.arange(self._kv_heads), len(groups.counts))
        queries = np.repeat(groups.counts, self._kv_heads)
        return (np.repeat(first, queries) + ragged_arange(queries)) * self._kv_heads + np.repeat(head, queries)

    def _fill(self, first: int) -> None:
        """Fill the lists of some layers, of all if they are small. first: index of the first one."""
        rows, places = self._groups.rows, self._groups.places
        bytes_per_layer = len(rows) * self._kv_heads * len(self._layout.rank) * self._state.page_table.itemsize
        layers = self._layers[first : first + max(1, _LIST_BYTES // bytes_per_layer)]
        lists = self._layout.fill(self._chosen[layers[:, None], rows, places])
        if not self._is_even:
            lists = lists.mul_(self._kv_heads).add_(self._heads).flatten(1, 2)
        self._first, self._lists = first, lists
        self._attention.plan(AttentionBatch(self._queries, self._lengths, lists, per_layer=True, late=self._late))

    def _enter(self, layer: LayerKV) -> int:
        """Return the index of a layer's lists, and fill them if need be. Layers run in order."""
        index = self._index[layer.index]
        if index - self._first == len(self._lists):
            self._fill(index)
        return index - self._first

    def write(self, layer: LayerKV, groups: Tensor, pages: Tensor) -> None:
        """Write new choices into the lists of a layer. groups: [n] int64. pages: [n, kv_heads, count] int64."""
        index, places = self._enter(layer), slice(self._sink, self._sink + self._count)
        lists = self._lists[index]
        if self._is_even:
            lists[groups, :, places] = pages
            return
        one_head = pages * self._kv_heads + self._heads
        by_head = lists.view(-1, self._kv_heads, lists.shape[1])
        by_head[groups[:, None], self._choosing, places] = one_head[:, self._choosing]

    def run(self, layer: LayerKV, q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """See PlannedAttention.run. q: [tokens, heads, head_dim], of all groups."""
        index = self._enter(layer)
        if self._is_even:
            return self._attention.run(replace(layer, index=index), q, scale)
        split = q.reshape(-1, q.shape[1] // self._kv_heads, q.shape[2])
        out, lse = self._attention.run(
            replace(layer.one_head(), index=index), split if self._order is None else split[self._order], scale
        )
        if self._order is not None:
            out, lse = (torch.empty_like(each).index_copy_(0, self._order, each) for each in (out, lse))
        out, lse = out.view(q.shape), lse.view(q.shape[:2])
        if layer.sinks is not None:
            merge_sinks(out, lse, layer.sinks)
        return out, lse
