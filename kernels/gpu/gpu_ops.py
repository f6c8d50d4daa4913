"""`kernels.ops` on GPUs, for float32, bfloat16 and float16 models: dense products by torch, the rest in Triton."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, cast

import torch
import triton
from torch import Tensor

from kernels.attention.base import AttentionBackend, GraphAttention, GraphBatch
from kernels.attention.reference_attention import merge_segments
from kernels.attention.triton_attention import GpuAttention, GpuGraphAttention, GpuPrefixGraphAttention
from kernels.flashinfer.attention_by_window import AttentionByWindow
from kernels.flashinfer.flashinfer_attention import FlashInferAttention
from kernels.flashinfer.flashinfer_graph import FlashInferGraphAttention, can_capture
from kernels.flashinfer.flashinfer_workspace import HEAD_DIMS, READABLE_KV, Workspace, load_flashinfer
from kernels.gpu import pointwise, sample, verdict
from kernels.gpu.gpu_experts import GpuExperts
from kernels.gpu.merge import merge_prefixes
from kernels.gpu.products.dense_linear import DenseLinear
from kernels.gpu.products.few_bit_layout import lay_out
from kernels.gpu.products.few_bit_linear import FewBitLinear
from kernels.gpu.products.format_times import device_seconds, fastest_format
from kernels.gpu.products.fp8_products import Fp8Linear
from kernels.gpu.products.product import GpuProduct, GroupedProduct, alike, group_products
from kernels.gpu.snapkv_scores import snapkv_scores
from kernels.key_summaries import bound_products, summarise_keys
from kernels.kv.kv_bits import KV_BITS
from kernels.kv.kv_pool import LayerKV
from kernels.ops import Experts, Gate, Graphs, Linear
from kernels.weights.matrix import DenseMatrix, Matrix, QuantizedMatrix
from kernels.weights.weight_format import FORMATS


class GpuLinear:
    """Product, followed by gating in Triton."""

    def __init__(self, product: GpuProduct, gated: Gate | None) -> None:
        self.product, self.gated = product, gated

    @property
    def nbytes(self) -> int:
        return self.product.nbytes

    @property
    def references_weights(self) -> bool:
        return self.product.references_weights

    def __call__(self, x: Tensor) -> Tensor:
        y = self.product(x)
        return pointwise.apply_gate(y, self.gated) if self.gated else y


def grouped(linears: Sequence[GpuLinear]) -> GroupedProduct:
    """Group products with one kind of gate. Raises ValueError if their layouts cannot be."""
    products = alike([each.product for each in linears])
    for linear, product in zip(linears, products, strict=True):
        linear.product = product
    return group_products(products, linears[0].gated)


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

    def __init__(
        self,
        workspace: Workspace | None = None,
        make_recorder: Callable[[], Recorder] | None = None,
        *,
        multiplies_fp8: bool = False,
    ) -> None:
        """workspace: FlashInfer's (see kernels.flashinfer.flashinfer_workspace), for float16 and bfloat16 models
        with a head_dim that it supports; None: attention in Triton. make_recorder: creates what captures graphs, once
        per engine; None: no graphs. multiplies_fp8: whether products of fp8 weights round their inputs to fp8 too
        (see kernels.gpu.products.fp8_products.multiplies_fp8)."""
        self._workspace, self._multiplies_fp8 = workspace, multiplies_fp8
        self._fastest: dict[int, str | None] = {}  # format by number of rows, as measured
        self.make_graphs: Callable[[], Graphs] | None = None
        if make_recorder is not None:
            self.make_graphs = lambda: GpuGraphs(make_recorder(), workspace)
        self.kv_formats = frozenset(KV_BITS) if workspace is None else READABLE_KV
        self.kind = "triton" if workspace is None else "flashinfer"
        library = triton if workspace is None else load_flashinfer()
        self.name = f"{self.kind} {library.__version__}"

    def shared_stretch(self, head_dim: int) -> int:
        return 1  # whole pages, of any size

    weight_formats = frozenset(FORMATS)

    def takes(self, matrix: Matrix) -> bool:
        return matrix.format in self.weight_formats

    def fastest_format(self, max_rows: int) -> str | None:
        if max_rows not in self._fastest:
            self._fastest[max_rows] = None
            if torch.cuda.is_available():
                device = torch.device("cuda", torch.cuda.current_device())
                self._fastest[max_rows] = fastest_format(
                    lambda matrix: self._product(matrix, None, wide=False), max_rows, device, device_seconds
                )
        return self._fastest[max_rows]

    def linear(
        self, matrix: Matrix, bias: Tensor | None, *, gated: Gate | None = None, wide: bool = False
    ) -> GpuLinear:
        return GpuLinear(self._product(matrix, bias, wide), gated)

    def _product(self, matrix: Matrix, bias: Tensor | None, wide: bool) -> GpuProduct:
        if isinstance(matrix, DenseMatrix):
            return DenseLinear(matrix.weight, bias, wide)
        assert isinstance(matrix, QuantizedMatrix)
        if self._multiplies_fp8 and Fp8Linear.takes(matrix):
            return Fp8Linear(matrix, bias, wide)
        return FewBitLinear(lay_out(matrix), bias, wide)

    def experts(self, networks: Sequence[tuple[Linear, Linear]], *, per_token: int, normalised: bool) -> Experts:
        pairs = cast("Sequence[tuple[GpuLinear, GpuLinear]]", networks)  # `linear` made them
        gate_up, down = (grouped([pair[place] for pair in pairs]) for place in (0, 1))
        return GpuExperts(gate_up, down, per_token, normalised)

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

    def snapkv_scores(
        self, q: Tensor, k: Tensor, scale: float, *, candidates: int, kernel: int, sinks: Tensor | None = None
    ) -> Tensor:
        return snapkv_scores(q, k, scale, candidates=candidates, kernel=kernel, sinks=sinks)

    def best(self, votes: Tensor, count: int) -> Tensor:
        return votes.topk(count).indices

    summarise = staticmethod(summarise_keys)
    bounds = staticmethod(bound_products)

    def merge(self, outputs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
        return merge_segments(outputs, lses)

    def attention(self, page_size: int, head_dim: int) -> AttentionBackend:
        if self._workspace is None or head_dim not in HEAD_DIMS:
            return GpuAttention()
        return AttentionByWindow(FlashInferAttention(page_size, self._workspace, merge_prefixes))
