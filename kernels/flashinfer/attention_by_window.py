"""Attention by FlashInfer, and by Triton where queries see a window."""

from __future__ import annotations

from torch import Tensor

from kernels.attention.base import AttentionBatch, PlannedAttention
from kernels.attention.triton_attention import GpuAttention
from kernels.flashinfer.flashinfer_attention import FlashInferAttention
from kernels.kv.kv_pool import LayerKV


class AttentionByWindow:
    """`AttentionBackend` of FlashInfer, and of Triton for batches with a window.

    FlashInfer compiles other modules for windows, which are not among those that are loaded when kernels are chosen.
    Nor is it tested that they leave alone what stands in pages before a window, which Triton's kernels do not read.
    """

    def __init__(self, without: FlashInferAttention) -> None:
        """without: attention to batches without a window."""
        self.without, self._with = without, GpuAttention()
        self._planned: PlannedAttention = without

    def plan(self, batch: AttentionBatch) -> None:
        backend = self._with if batch.window else self.without
        backend.plan(batch)
        self._planned = backend

    def run(self, layer: LayerKV, q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """See PlannedAttention.run."""
        return self._planned.run(layer, q, scale)
