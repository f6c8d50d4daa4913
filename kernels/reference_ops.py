"""`kernels.ops` in plain torch, for any device and dtype: the reference for all other implementations."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention.reference_attention import ReferenceAttention, merge_segments
from kernels.key_scores import snapkv_scores
from kernels.key_summaries import bound_products, summarise_keys
from kernels.kv_cache import LayerKV, write_kv
from kernels.noise import gumbel_noise
from kernels.ops import Graphs
from kernels.rope import apply_rope


class ReferenceLinear:
    """Product with the weights as given."""

    references_weights = True

    def __init__(self, weight: Tensor, bias: Tensor | None, gated: bool, wide: bool) -> None:
        self._weight, self._bias = weight, bias
        self._gated, self._wide = gated, wide

    @property
    def nbytes(self) -> int:
        return self._weight.nbytes + (self._bias.nbytes if self._bias is not None else 0)

    def __call__(self, x: Tensor) -> Tensor:
        return self._finish(F.linear(x, self._weight, self._bias))

    def quantized(self) -> Int8Linear:
        return Int8Linear(self._weight, self._bias, self._gated, self._wide)

    def _finish(self, y: Tensor) -> Tensor:
        if self._gated:
            gate, value = y.chunk(2, dim=-1)
            y = F.silu(gate).mul_(value)
        return y.float() if self._wide and y.dtype != torch.float64 else y


class Int8Linear(ReferenceLinear):
    """Product of 8-bit integers, computed in a float type that represents each of them exactly."""

    references_weights = False

    def __init__(self, weight: Tensor, bias: Tensor | None, gated: bool, wide: bool) -> None:
        exact = torch.promote_types(weight.dtype, torch.float32)
        whole = weight.to(exact)
        self._scales = (whole.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        super().__init__((whole / self._scales[:, None]).round().to(torch.int8), bias, gated, wide)

    @property
    def nbytes(self) -> int:
        return super().nbytes + self._scales.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        exact = x.to(self._scales.dtype)
        scales = (exact.abs().amax(-1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        sums = F.linear((exact / scales).round(), self._weight.to(exact.dtype)) * scales * self._scales
        if self._bias is not None:
            sums += self._bias
        y = self._finish(sums)
        return y if self._wide else y.to(x.dtype)

    def quantized(self) -> Int8Linear:
        return self


class TorchFallbackOps:
    """Operations of kernels.ops.Ops for which plain torch is good enough on any CPU."""

    accept = None
    commit = None
    reads_prefixes = False

    def shared_stretch(self, head_dim: int) -> int:
        return 0

    def snapkv_scores(self, q: Tensor, k: Tensor, scale: float, *, candidates: int, kernel: int) -> Tensor:
        return snapkv_scores(q, k, scale, candidates=candidates, kernel=kernel)

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

    def linear(
        self, weight: Tensor, bias: Tensor | None, *, gated: bool = False, wide: bool = False
    ) -> ReferenceLinear:
        return ReferenceLinear(weight, bias, gated, wide)

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
