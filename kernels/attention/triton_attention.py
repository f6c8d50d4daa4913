"""Attention on GPUs by Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from kernels.attention.base import AttentionBatch, GraphBatch, SharedPrefix
from kernels.attention.shared_reading import pays
from kernels.flashinfer.flashinfer_sizes import Heads
from kernels.gpu.attention import SPAN, attend
from kernels.gpu.query_tiles import SharedTiles, Tiles, assign_tiles, tile_size
from kernels.kv.kv_pool import LayerKV
from kernels.transfer import send


class GpuAttention:
    """`AttentionBackend` for float32, bfloat16 and float16, any head_dim and page size.

    Other rows of the batch may change the rounding of a query's result: they decide how many spans lists are cut into.
    """

    def __init__(self, span: int = SPAN) -> None:
        """span: smallest number of KV slots for a program of its own, a multiple of 64."""
        self._span = span
        self._batch: AttentionBatch | None = None
        self._tiles: Tiles | None = None

    def plan(self, batch: AttentionBatch) -> None:
        """Keep the batch: whether shared pages are read once depends on the heads, which the first `run` shows."""
        self._batch, self._tiles = batch, None

    def run(self, layer: LayerKV, q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """See PlannedAttention.run."""
        if self._tiles is None:
            self._tiles = self._assign(layer, q)
        assert self._batch is not None
        return attend(self._tiles, layer, q, scale, self._span, self._batch.ballot)

    def _assign(self, layer: LayerKV, q: Tensor) -> Tiles:
        """Plan on the host, from host integers, without waiting for the device."""
        batch = self._batch
        assert batch is not None, "run before plan"
        tokens, heads, head_dim = q.shape
        kv_heads, page_size = layer.k.shape[1:3]
        sizes = Heads(heads, kv_heads, head_dim)
        if pays(batch.prefixes, page_size, sizes, layer.itemsize, tokens):
            shared = SharedTiles(
                np.array(batch.query_lengths, dtype=np.int64),
                np.array(batch.kv_lengths, dtype=np.int64),
                batch.prefixes,
                block=tile_size(tokens, len(batch.query_lengths), sizes.group),
                page_size=page_size,
            )
            return shared.tiles(send(torch.from_numpy(shared.numbers), q.device), batch.pages)
        queries = torch.tensor(batch.query_lengths, dtype=torch.int64)
        lengths = torch.tensor(batch.kv_lengths, dtype=torch.int64)
        tiles = assign_tiles(queries, lengths, batch.pages, tokens, per_layer=batch.per_layer).to(q.device)
        return replace(tiles, window=batch.window)


class GpuGraphAttention:
    """`GraphAttention` for the same dtypes, without prefixes. The kernels read all that changes on the device."""

    def __init__(self, batch: GraphBatch, span: int = SPAN) -> None:
        """span: see GpuAttention."""
        self._span, self._ballot = span, batch.ballot
        queries = torch.full_like(batch.lengths, batch.queries)
        tokens = batch.queries * len(queries)
        tiles = assign_tiles(queries, batch.lengths, batch.pages, tokens, uniform=True, per_layer=batch.per_layer)
        self._tiles = replace(tiles, window=batch.window)

    def plan(self, kv_lengths: Sequence[int], prefixes: Sequence[SharedPrefix] = ()) -> None:
        """Do nothing: no part of the plan depends on lengths."""

    def run(self, layer: LayerKV, q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """See PlannedAttention.run."""
        return attend(self._tiles, layer, q, scale, self._span, self._ballot)


class GpuPrefixGraphAttention:
    """`GraphAttention` for the same dtypes, of a batch with room for prefixes. Each plan lays out the tiles anew, in
    one copy to a fixed place."""

    def __init__(self, batch: GraphBatch, span: int = SPAN) -> None:
        """span: see GpuAttention."""
        self._batch, self._span = batch, span
        self._planned: tuple[Sequence[int], Sequence[SharedPrefix]] | None = None
        self._block, self._page_size = 0, 0
        self._numbers: Tensor | None = None
        self._tiles: Tiles | None = None

    def plan(self, kv_lengths: Sequence[int], prefixes: Sequence[SharedPrefix] = ()) -> None:
        """See GraphAttention.plan. Work on the host is O(rows)."""
        self._planned = kv_lengths, prefixes
        if self._numbers is not None:
            self._numbers.copy_(send(torch.from_numpy(self._lay_out().numbers), self._numbers.device))

    def run(self, layer: LayerKV, q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """See GraphAttention.run. The first one, which is not captured, decides the sizes."""
        if self._tiles is None:
            pages = self._batch.pages
            kv_heads, self._page_size = layer.k.shape[1:3]
            self._block = tile_size(len(q), len(pages), q.shape[1] // kv_heads)
            layout = self._lay_out()
            self._numbers = torch.empty(len(layout.numbers), dtype=torch.int64, device=q.device)
            self._numbers.copy_(send(torch.from_numpy(layout.numbers), q.device))
            self._tiles = layout.tiles(self._numbers, pages, pages.shape[-1] * self._page_size)
        return attend(self._tiles, layer, q, scale, self._span, self._batch.ballot)

    def _lay_out(self) -> SharedTiles:
        assert self._planned is not None, "run before plan"
        kv_lengths, prefixes = self._planned
        queries = np.full(len(kv_lengths), self._batch.queries, dtype=np.int64)
        lengths = np.array(kv_lengths, dtype=np.int64)
        sizes = {"block": self._block, "page_size": self._page_size, "room": self._batch.prefixes}
        return SharedTiles(queries, lengths, prefixes, **sizes)
