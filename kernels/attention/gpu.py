"""Attention on GPUs, by kernels in Triton."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from kernels.attention.base import AttentionBatch
from kernels.gpu.attention import SPAN, Tiles, attend, lay_tiles
from kernels.kv_cache import LayerKV


class GpuAttention:
    """`AttentionBackend` for float32, bfloat16 and float16, any head_dim and page size.

    A query's result may differ in rounding with the rows beside it: they decide into how many spans lists are cut.
    """

    def __init__(self, span: int = SPAN) -> None:
        """span: KV slots that are worth a program of their own, a multiple of 64."""
        self._span = span
        self._tiles: Tiles

    def plan(self, batch: AttentionBatch) -> None:
        """Laid out on the host, from host integers; the device is not waited for."""
        queries = torch.tensor(batch.query_lengths, dtype=torch.int64)
        lengths = torch.tensor(batch.kv_lengths, dtype=torch.int64)
        tiles = lay_tiles(queries, lengths, batch.pages, sum(batch.query_lengths))
        self._tiles = tiles.to(batch.pages.device)

    @overload
    def run(self, layer: LayerKV, q: Tensor, scale: float, *, lse: Literal[False] = False) -> Tensor: ...
    @overload
    def run(self, layer: LayerKV, q: Tensor, scale: float, *, lse: Literal[True]) -> tuple[Tensor, Tensor]: ...
    def run(self, layer: LayerKV, q: Tensor, scale: float, *, lse: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """See AttentionBackend.run."""
        o, sums = attend(self._tiles, layer, q, scale, self._span)
        return (o, sums) if lse else o
