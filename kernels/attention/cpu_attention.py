"""Attention on CPUs by compiled kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.attention.base import AttentionBatch
from kernels.cpu.library import CpuKernels
from kernels.kv.kv_pool import LayerKV


class CpuAttention:
    """`AttentionBackend` for float32, bfloat16 and float16 on a CPU, head_dim a multiple of 16, pages sealed or not.

    A query's result is bit-identical whatever else is in the batch, and whether the query comes alone, with drafts
    after it or as part of a prefill chunk. (A value that overflows to infinity, as in float16, makes the results of
    earlier queries of its row NaN, too: 0 × infinity is NaN.)
    """

    def __init__(self, kernels: CpuKernels) -> None:
        self._kernels = kernels
        self._queries: Tensor
        self._lengths: Tensor
        self._batch: AttentionBatch

    def plan(self, batch: AttentionBatch) -> None:
        self._queries = torch.tensor(batch.query_lengths, dtype=torch.int64)
        self._lengths = torch.tensor(batch.kv_lengths, dtype=torch.int64)
        self._batch = batch

    def run(self, layer: LayerKV, q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """See AttentionBackend.run."""
        batch = self._batch
        return self._kernels.attention(
            q,
            layer.k,
            layer.v,
            self._queries,
            self._lengths,
            batch.pages_of(layer),
            scale,
            batch.ballot,
            layer.sealed,
            batch.window,
            layer.sinks,
        )
