"""`kernels.ops` on CPUs by compiled kernels, for float32, bfloat16 and float16 models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

from torch import Tensor

from kernels.attention.base import AttentionBackend
from kernels.attention.cpu_attention import CpuAttention
from kernels.attention.reference_attention import ReferenceAttention
from kernels.cpu.library import READABLE_KV, SEGMENT, CpuKernels
from kernels.cpu.micro_profile import MicroProfile
from kernels.cpu.packing import Packed, can_pack, pack
from kernels.key_summaries import bound_products, summarise_keys
from kernels.kv.kv_pool import LayerKV
from kernels.ops import Experts, Gate, Graphs, Linear
from kernels.reference_ops import TorchFallbackOps
from kernels.weights.matrix import Matrix
from kernels.weights.weight_format import FORMATS


class CpuLinear:
    """Product with packed weights."""

    references_weights = False

    def __init__(self, kernels: CpuKernels, weights: Packed, gated: Gate | None, wide: bool) -> None:
        self._kernels, self.weights = kernels, weights
        self.gated, self._wide = gated, wide

    @property
    def nbytes(self) -> int:
        return self.weights.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        return self._kernels.linear(x, self.weights, gate=self.gated, float_out=self._wide)


class CpuExperts:
    """Mixture of experts in one call, for float32 scores."""

    def __init__(
        self,
        kernels: CpuKernels,
        products: Sequence[tuple[Packed, Packed]],
        gate: Gate,
        per_token: int,
        normalised: bool,
    ) -> None:
        self._kernels, self._networks = kernels, kernels.networks(products, gate)
        self._per_token, self._normalised = per_token, normalised

    def __call__(self, x: Tensor, scores: Tensor) -> Tensor:
        return self._kernels.experts(self._networks, x, scores, self._per_token, self._normalised)


class CpuOps(TorchFallbackOps):
    """See kernels.ops.Ops. A row's results do not depend on other rows at all, except in attention with a head_dim that
    is not a multiple of 16, which plain torch computes, as it does their bounds."""

    kind = "cpu"
    make_graphs: Callable[[], Graphs] | None = None

    def __init__(self, kernels: CpuKernels, profile: MicroProfile | None = None) -> None:
        """profile: measured rates of the kernels."""
        self._kernels, self._profile = kernels, profile
        self.name = kernels.name

    weight_formats = frozenset(FORMATS)
    kv_formats = READABLE_KV

    def fastest_format(self, max_rows: int) -> str | None:
        return "int8" if self._profile is None else self._profile.fastest_format(max_rows)

    def takes(self, matrix: Matrix) -> bool:
        return can_pack(matrix)

    def linear(
        self, matrix: Matrix, bias: Tensor | None, *, gated: Gate | None = None, wide: bool = False
    ) -> CpuLinear:
        return CpuLinear(self._kernels, pack(matrix, bias, gated=gated is not None), gated, wide)

    def experts(self, networks: Sequence[tuple[Linear, Linear]], *, per_token: int, normalised: bool) -> Experts:
        pairs = cast("Sequence[tuple[CpuLinear, CpuLinear]]", networks)  # `linear` made them
        products = [(gate_up.weights, down.weights) for gate_up, down in pairs]
        gate = pairs[0][0].gated
        assert gate is not None
        if any(weights.order is not None for pair in products for weights in pair):  # of features
            return super().experts(networks, per_token=per_token, normalised=normalised)
        return CpuExperts(self._kernels, products, gate, per_token, normalised)

    def norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        return self._kernels.norm(x, delta, weight, eps)

    def rotate_and_cache(
        self,
        qkv: Tensor,
        rotary: tuple[Tensor, Tensor],
        positions: Tensor,
        slots: Tensor,
        kv: LayerKV,
        norms: tuple[Tensor, Tensor, float] | None,
    ) -> Tensor:
        self._kernels.rotary(qkv, *rotary, positions, slots, kv.k, kv.v, norms)
        return qkv[:, : qkv.shape[1] - 2 * kv.k.shape[1]]

    def sample(
        self, logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor, first: int
    ) -> tuple[Tensor, Tensor]:
        return self._kernels.sample(logits, temperature.float(), seeds, positions, first)

    def best(self, votes: Tensor, count: int) -> Tensor:
        return self._kernels.best(votes, count)

    def summarise(self, k: Tensor, pages: Tensor, low: Tensor, high: Tensor) -> None:
        summarise = summarise_keys if k.shape[3] % 16 else self._kernels.summarise
        summarise(k, pages, low, high)

    def bounds(self, q: Tensor, pages: Tensor, low: Tensor, high: Tensor, first: int, ends: Tensor) -> Tensor:
        bounds = bound_products if q.shape[2] % 16 else self._kernels.bounds
        return bounds(q, pages, low, high, first, ends)

    def shared_stretch(self, head_dim: int) -> int:
        return 0 if head_dim % 16 else SEGMENT

    def attention(self, page_size: int, head_dim: int) -> AttentionBackend:
        return ReferenceAttention(page_size) if head_dim % 16 else CpuAttention(self._kernels)
