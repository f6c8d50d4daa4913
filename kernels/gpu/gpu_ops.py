"""`kernels.ops` on GPUs, for float32, bfloat16 and float16 models: matrix products by torch, the rest in Triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import triton
from torch import Tensor

from kernels.attention.base import AttentionBackend, GraphAttention, GraphBatch
from kernels.attention.reference_attention import merge_segments
from kernels.attention.triton_attention import GpuAttention, GpuGraphAttention, GpuPrefixGraphAttention
from kernels.flashinfer.flashinfer_attention import FlashInferAttention
from kernels.flashinfer.flashinfer_graph import FlashInferGraphAttention, can_capture
from kernels.flashinfer.flashinfer_workspace import HEAD_DIMS, Workspace, load_flashinfer
from kernels.gpu import pointwise, sample, verdict
from kernels.gpu.merge import merge_prefixes
from kernels.gpu.snapkv_scores import snapkv_scores
from kernels.key_summaries import bound_products, summarise_keys
from kernels.kv_cache import LayerKV
from kernels.ops import Graphs, Linear
from kernels.reference_ops import ReferenceLinear


class GpuLinear:
    """Product by torch, followed by gating in Triton."""

    def __init__(self, inner: Linear, gated: bool) -> None:
        self._inner, self._gated = inner, gated

    @property
    def nbytes(self) -> int:
        return self._inner.nbytes

    @property
    def references_weights(self) -> bool:
        return self._inner.references_weights

    def __call__(self, x: Tensor) -> Tensor:
        y = self._inner(x)
        return pointwise.silu_mul(y) if self._gated else y

    def quantized(self) -> GpuLinear:
        return GpuLinear(self._inner.quantized(), self._gated)


class Recorder(Protocol):
    """Interface of graph capture; see kernels.gpu.cuda_graphs."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None]: ...

    def release(self) -> None: ...


class GpuGraphs:
    """See kernels.ops.Graphs."""

    def __init__(self, recorder: Recorder, workspace: Workspace | None) -> None:
        self._workspace = workspace
        self.capture, self.release = recorder.capture, recorder.release

    def attention(self, page_size: int, head_dim: int, batch: GraphBatch) -> GraphAttention:
        workspace = self._workspace
        if workspace is None or head_dim not in HEAD_DIMS or not can_capture(head_dim, batch):
            return GpuPrefixGraphAttention(batch) if batch.prefixes else GpuGraphAttention(batch)
        return FlashInferGraphAttention(page_size, workspace, batch, merge_prefixes)


class GpuOps:
    """See kernels.ops.Ops. BLAS computes products; Triton, or FlashInfer for attention, computes the rest."""

    reads_prefixes = True

    def __init__(self, workspace: Workspace | None = None, make_recorder: Callable[[], Recorder] | None = None) -> None:
        """workspace: FlashInfer's (see kernels.flashinfer.flashinfer_workspace), for float16 and bfloat16 models
        with a head_dim that it supports; None: attention in Triton. make_recorder: creates what captures graphs, once
        per engine; None: no graphs."""
        self._workspace = workspace
        self.make_graphs: Callable[[], Graphs] | None = None
        if make_recorder is not None:
            self.make_graphs = lambda: GpuGraphs(make_recorder(), workspace)
        self.kind = "triton" if workspace is None else "flashinfer"
        library = triton if workspace is None else load_flashinfer()
        self.name = f"{self.kind} {library.__version__}"

    def shared_stretch(self, head_dim: int) -> int:
        return 1  # whole pages, of any size

    def linear(self, weight: Tensor, bias: Tensor | None, *, gated: bool = False, wide: bool = False) -> GpuLinear:
        return GpuLinear(ReferenceLinear(weight, bias, gated=False, wide=wide), gated)

    def norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        return pointwise.norm(x, delta, weight, eps)

    def rotate_and_cache(
        self,
        qkv: Tensor,
        rotary: tuple[Tensor, Tensor],
        positions: Tensor,
        slots: Tensor,
        kv: LayerKV,
        norms: tuple[Tensor, Tensor, float] | None,
    ) -> Tensor:
        pointwise.rotary(qkv, *rotary, positions, slots, kv, norms)
        return qkv[:, : qkv.shape[1] - 2 * kv.k.shape[1]]

    def sample(
        self, logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor, first: int
    ) -> tuple[Tensor, Tensor]:
        return sample.sample(logits, temperature, seeds, positions, first)

    accept = staticmethod(verdict.accept)
    commit = staticmethod(verdict.commit)

    def snapkv_scores(self, q: Tensor, k: Tensor, scale: float, *, candidates: int, kernel: int) -> Tensor:
        return snapkv_scores(q, k, scale, candidates=candidates, kernel=kernel)

    def best(self, votes: Tensor, count: int) -> Tensor:
        return votes.topk(count).indices

    summarise = staticmethod(summarise_keys)
    bounds = staticmethod(bound_products)

    def merge(self, outputs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
        return merge_segments(outputs, lses)

    def attention(self, page_size: int, head_dim: int) -> AttentionBackend:
        if self._workspace is None or head_dim not in HEAD_DIMS:
            return GpuAttention()
        return FlashInferAttention(page_size, self._workspace, merge_prefixes)
