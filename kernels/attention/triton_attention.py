"""Attention on GPUs by Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.attention.base import AttentionBatch, GraphShape
from kernels.gpu.attention import SPAN, Tiles, assign_tiles, attend
from kernels.kv_cache import LayerKV


class GpuAttention:
    """`AttentionBackend` for float32, bfloat16 and float16, any head_dim and page size.

    Other rows of the batch may change the rounding of a query's result: they decide how many spans lists are cut into.
    """

    def __init__(self, span: int = SPAN, graph_shape: GraphShape | None = None) -> None:
        """span: smallest number of KV slots for a program of its own, a multiple of 64. fixed: shape of batches that a
        CUDA graph replays; other batches are refused, and plans are kept at fixed addresses."""
        self._span = span
        self._graph_shape = graph_shape
        self._tiles: Tiles | None = None

    def plan(self, batch: AttentionBatch) -> None:
        """Plan on the host, from host integers, without waiting for the device. Raises ValueError if the batch does not
        fit `fixed`."""
        queries = torch.tensor(batch.query_lengths, dtype=torch.int64)
        lengths = torch.tensor(batch.kv_lengths, dtype=torch.int64)
        if (graph_shape := self._graph_shape) is None:
            self._tiles = assign_tiles(queries, lengths, batch.pages, sum(batch.query_lengths)).to(batch.pages.device)
            return
        graph_shape.check(batch)
        pages = batch.pages
        if self._tiles is None or self._tiles.pages.shape[:-1] != pages.shape[:-1]:
            kept = pages.new_zeros(*pages.shape[:-1], graph_shape.width)
            self._tiles = assign_tiles(queries, lengths, kept, graph_shape.tokens).to(pages.device)
        else:
            self._tiles.take(assign_tiles(queries, lengths, pages, graph_shape.tokens))
        self._tiles.pages[..., : pages.shape[-1]] = pages

    def run(self, layer: LayerKV, q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """See AttentionBackend.run."""
        assert self._tiles is not None, "run before plan"
        o, sums = attend(self._tiles, layer, q, scale, self._span)
        return o, sums
