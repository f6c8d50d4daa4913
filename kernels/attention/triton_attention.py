"""Attention on GPUs by Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.attention.base import AttentionBatch, GraphBatch
from kernels.gpu.attention import SPAN, Tiles, assign_tiles, attend
from kernels.kv_cache import LayerKV


class GpuAttention:
    """`AttentionBackend` for float32, bfloat16 and float16, any head_dim and page size.

    Other rows of the batch may change the rounding of a query's result: they decide how many spans lists are cut into.
    """

    def __init__(self, span: int = SPAN) -> None:
        """span: smallest number of KV slots for a program of its own, a multiple of 64."""
        self._span = span
        self._tiles: Tiles | None = None

    def plan(self, batch: AttentionBatch) -> None:
        """Plan on the host, from host integers, without waiting for the device."""
        queries = torch.tensor(batch.query_lengths, dtype=torch.int64)
        lengths = torch.tensor(batch.kv_lengths, dtype=torch.int64)
        tiles = assign_tiles(queries, lengths, batch.pages, sum(batch.query_lengths))
        self._tiles = tiles.to(batch.pages.device)

    def run(self, layer: LayerKV, q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """See PlannedAttention.run."""
        assert self._tiles is not None, "run before plan"
        return attend(self._tiles, layer, q, scale, self._span)


class GpuGraphAttention:
    """`GraphAttention` for the same dtypes. The kernels read all that changes on the device."""

    def __init__(self, batch: GraphBatch, span: int = SPAN) -> None:
        """span: see GpuAttention."""
        self._span = span
        queries = torch.full_like(batch.lengths, batch.queries)
        tokens = batch.queries * len(queries)
        self._tiles = assign_tiles(queries, batch.lengths, batch.pages, tokens, uniform=True)

    def plan(self, kv_lengths: Sequence[int]) -> None:
        """Do nothing: no part of the plan depends on lengths."""

    def run(self, layer: LayerKV, q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """See PlannedAttention.run."""
        return attend(self._tiles, layer, q, scale, self._span)
