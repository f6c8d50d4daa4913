"""`kernels.ops` in plain torch, for any device and dtype: the reference for all other implementations."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention.reference_attention import ReferenceAttention, merge_segments
from kernels.key_scores import snapkv_scores
from kernels.key_summaries import bound_products, summarise_keys
from kernels.kv.kv_bits import KV_BITS
from kernels.kv.kv_pool import LayerKV, write_kv
from kernels.noise import gumbel_noise
from kernels.ops import CLAMP, STEEPNESS, Experts, Gate, Graphs, Linear
from kernels.reference_experts import LoopedExperts
from kernels.rope import apply_rope
from kernels.weights.matrix import TINY, DenseMatrix, Matrix, QuantizedMatrix
from kernels.weights.weight_format import FORMATS


class ReferenceLinear:
    """Product with the weights as given."""

    references_weights = True

    def __init__(self, weight: Tensor, bias: Tensor | None, gated: Gate | None, wide: bool) -> None:
        self.weight, self._bias = weight, bias
        self._gated, self._wide = gated, wide

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + (self._bias.nbytes if self._bias is not None else 0)

    def __call__(self, x: Tensor) -> Tensor:
        return self._finish(F.linear(x, self.weight, self._bias), x.dtype)

    def _finish(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        """dtype: of the result, unless it is wide."""
        if self._gated:
            gate, value = y.chunk(2, dim=-1)
            y = _join(self._gated, gate, value)
        if not self._wide:
            return y.to(dtype)
        return y.float() if y.dtype != torch.float64 else y


def _join(how: Gate, gate: Tensor, value: Tensor) -> Tensor:
    """See kernels.ops.Gate."""
    if how == "clamped_silu":
        gate = gate.clamp(max=CLAMP)
        return gate.mul(torch.sigmoid(STEEPNESS * gate)).mul_(value.clamp(-CLAMP, CLAMP).add_(1))
    active = F.silu(gate) if how == "silu" else F.gelu(gate, approximate="tanh")
    return active.mul_(value)


class QuantizedLinear(ReferenceLinear):
    """Product with the values of a quantized matrix, in float32 or wider."""

    references_weights = False

    def __init__(self, matrix: QuantizedMatrix, bias: Tensor | None, gated: Gate | None, wide: bool) -> None:
        super().__init__(matrix.codes, bias, gated, wide)
        self._matrix = matrix

    @property
    def nbytes(self) -> int:
        return self._matrix.nbytes + (self._bias.nbytes if self._bias is not None else 0)

    def __call__(self, x: Tensor) -> Tensor:
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        sums = self._sums(exact)
        if self._bias is not None:
            sums += self._bias
        return self._finish(sums, x.dtype)

    def _sums(self, x: Tensor) -> Tensor:
        return F.linear(x, self._matrix.dense(x.dtype))


class Int8Linear(QuantizedLinear):
    """Product of 8-bit integers with one scale per row on both sides, computed in a float type that represents each of
    them exactly."""

    def _sums(self, x: Tensor) -> Tensor:
        scales = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=TINY)
        sums = F.linear((x / scales).round(), self._matrix.codes.to(x.dtype))
        return sums * scales * self._matrix.scales[:, 0]


def reference_linear(matrix: Matrix, bias: Tensor | None, gated: Gate | None, wide: bool) -> ReferenceLinear:
    """Prepare a matrix of any format; see Ops.linear."""
    matrix = matrix.owned()
    if isinstance(matrix, DenseMatrix):
        return ReferenceLinear(matrix.weight, bias, gated, wide)
    assert isinstance(matrix, QuantizedMatrix)
    return (Int8Linear if matrix.rounds_inputs else QuantizedLinear)(matrix, bias, gated, wide)


class TorchFallbackOps:
    """Operations of kernels.ops.Ops for which plain torch is good enough on any CPU."""

    kv_formats = frozenset(KV_BITS)
    accept = None
    commit = None
    reads_prefixes = False

    def shared_stretch(self, head_dim: int) -> int:
        return 0

    def fastest_format(self, max_rows: int) -> str | None:
        return None

    def experts(self, networks: Sequence[tuple[Linear, Linear]], *, per_token: int, normalised: bool) -> Experts:
        return LoopedExperts(networks, per_token, normalised)

    def snapkv_scores(
        self, q: Tensor, k: Tensor, scale: float, *, candidates: int, kernel: int, sinks: Tensor | None = None
    ) -> Tensor:
        return snapkv_scores(q, k, scale, candidates=candidates, kernel=kernel, sinks=sinks)

    def best(self, votes: Tensor, count: int) -> Tensor:
        return votes.sort(dim=1, descending=True, stable=True).indices[:, :count]

    def summarise(self, k: Tensor, pages: Tensor, low: Tensor, high: Tensor) -> None:
        summarise_keys(k, pages, low, high)

    def bounds(self, q: Tensor, pages: Tensor, low: Tensor, high: Tensor, first: int, ends: Tensor) -> Tensor:
        return bound_products(q, pages, low, high, first, ends)

    def merge(self, outputs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
        return merge_segments(outputs, lses)


class ReferenceOps(TorchFallbackOps):
    """See kernels.ops.Ops."""

    kind = name = "reference"
    make_graphs: Callable[[], Graphs] | None = None

    weight_formats = frozenset(FORMATS)

    def takes(self, matrix: Matrix) -> bool:
        return matrix.format in self.weight_formats

    def linear(
        self, matrix: Matrix, bias: Tensor | None, *, gated: Gate | None = None, wide: bool = False
    ) -> ReferenceLinear:
        return reference_linear(matrix, bias, gated, wide)

    def norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        if delta is not None:
            x += delta
        return F.rms_norm(x, weight.shape, weight, eps)

    def rotate_and_cache(
        self,
        qkv: Tensor,
        rotary: tuple[Tensor, Tensor],
        positions: Tensor,
        slots: Tensor,
        kv: LayerKV,
        norms: tuple[Tensor, Tensor, float] | None,
    ) -> Tensor:
        kv_heads = kv.k.shape[1]
        q, k, v = qkv.split_with_sizes([qkv.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
        if norms is not None:
            of_q, of_k, eps = norms
            q, k = F.rms_norm(q, of_q.shape, of_q, eps), F.rms_norm(k, of_k.shape, of_k, eps)
        cos, sin = (table.index_select(0, positions) for table in rotary)
        write_kv(kv, slots, apply_rope(k, cos, sin), v)
        return apply_rope(q, cos, sin)

    def sample(
        self, logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor, first: int
    ) -> tuple[Tensor, Tensor]:
        last = first + logits.shape[1]
        if logits.is_cuda:  # by mask: selecting the sampled rows would make the host wait for the device
            divided = logits / torch.where(temperature > 0, temperature, 1.0)[:, None].to(logits.dtype)
            noisy = divided + gumbel_noise(seeds, positions, first, last)
            logits = torch.where((temperature > 0)[:, None], noisy, logits)
        elif len(rows := temperature.nonzero()[:, 0]):
            divided = logits[rows] / temperature[rows, None].to(logits.dtype)
            logits[rows] = divided + gumbel_noise(seeds[rows], positions[rows], first, last)
        values, index = logits.max(-1)
        return values, index + first

    def attention(self, page_size: int, head_dim: int) -> ReferenceAttention:
        return ReferenceAttention(page_size)


REFERENCE = ReferenceOps()
