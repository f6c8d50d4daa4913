"""The CPU kernels as Python calls them."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu.compiler import InstructionSet, KernelsUnavailable, build_kernels, build_operators, supported

BLOCK = 32
"""Output features that are packed together; BLOCK of csrc/kernels.h."""
_ELEMENTS = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 2, torch.int8: 4}
"""Neighbouring input features in a word of 32 bits."""


class CpuKernels:
    """One instruction set's kernels, compiled if need be. All tensors are on the CPU.

    dtypes below: float32, bfloat16 or float16. Results of a row depend on that row alone, not on the rows beside it,
    their number, or the number of threads.
    """

    def __init__(self, folder: Path | None, target: InstructionSet | None = None) -> None:
        """folder: where compiled ones are kept; None: only those of the installation serve. target: an instruction set
        that this processor has; None: the best. Raises KernelsUnavailable."""
        target = target or supported()[0]
        library = build_operators(folder)
        try:
            torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
            library = build_kernels(target, folder)
            self._kernels: int = torch.ops.magicdec_cpu.open(str(library))
        except KernelsUnavailable:
            raise
        except (OSError, RuntimeError) as error:
            # A file that was not written to its end, or a folder from which nothing may be executed.
            reason = str(error).partition("\n")[0]
            raise KernelsUnavailable(
                f"{library} cannot be loaded; remove it to have it built anew: {reason}"
            ) from error
        ops = torch.ops.magicdec_cpu
        self.name = library.stem.removeprefix("kernels-")
        # Looked up once: a model makes hundreds of calls per token.
        self._attention, self._linear, self._norm = ops.attention.default, ops.linear.default, ops.norm.default
        self._rotary, self._sample = ops.rotary.default, ops.sample.default

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, queries: Tensor, lengths: Tensor, pages: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """See kernels.attention.base.

        q: [tokens, heads, head_dim], head_dim a multiple of 16. k, v: [pages, kv_heads, page_size, head_dim]. queries,
        lengths: [rows] int64. pages: [rows, width] or [rows, kv_heads, width] int64. Returns o, in q's dtype, and the
        log-sum-exp [tokens, heads] float32.
        """
        o, sums = self._attention(self._kernels, q, k, v, queries, lengths, pages, scale)
        return o, sums

    def linear(self, x: Tensor, weights: PackedWeights, *, silu_mul: bool = False, float_out: bool = False) -> Tensor:
        """x w^T + bias: [rows, features] to [rows, columns], of x's dtype or float32.

        weights: in x's dtype, or int8; then x is quantised too, each row by its largest element. silu_mul: what is
        packed are gates and as many values (`pack_gated`); what comes out is silu(gate) * value.
        """
        y: Tensor = self._linear(
            self._kernels,
            x,
            weights.packed,
            weights.scales,
            weights.offsets,
            weights.bias,
            weights.columns,
            silu_mul,
            float_out,
        )
        return y

    def norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        """Add delta to x, in place, and return the root-mean-square norm of that: all [rows, size] of one dtype."""
        out: Tensor = self._norm(self._kernels, x, delta, weight, eps)
        return out

    def rotary(
        self,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor,
        slots: Tensor,
        k: Tensor,
        v: Tensor,
        norms: tuple[Tensor, Tensor, float] | None = None,
    ) -> None:
        """Rotate queries and keys in place, and store keys and values in the pool.

        qkv: [tokens, heads + 2 kv_heads, head_dim]. cos, sin: [positions, head_dim / 2] float32, of all positions.
        positions, slots: [tokens] int64. k, v: [pages, kv_heads, page_size, head_dim]. norms: of queries and of keys,
        their weights [head_dim] and their eps.
        """
        of_q, of_k, eps = norms or (None, None, 0.0)
        self._rotary(self._kernels, qkv, cos, sin, positions, slots, k, v, of_q, of_k, eps)

    def sample(
        self, logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor, first: int
    ) -> tuple[Tensor, Tensor]:
        """The coupled sampling rule: each row's largest logit / temperature + noise, and its token id.

        logits: [rows, size] float32, of the tokens from `first` on. temperature: [rows] float32, 0 for the largest
        logit itself. seeds, positions: [rows] int64. Returns [rows] float32 and [rows] int64, the lowest id among
        equals.
        """
        values, tokens = self._sample(self._kernels, logits, temperature, seeds, positions, first)
        return values, tokens


class PackedWeights:
    """A weight matrix as `CpuKernels.linear` reads it: blocks of BLOCK output features, within them words of
    neighbouring input features, [blocks, words, BLOCK, elements of a word]. It costs what the matrix does, rounded
    up.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, columns: int | None = None) -> None:
        """weight: [n, features] float32, bfloat16, float16 or int8. bias: [n]. columns: of the result, if not n."""
        rows, features = weight.shape
        self.columns = rows if columns is None else columns
        self.scales: Tensor | None = None
        self.offsets: Tensor | None = None
        padding = -rows % BLOCK
        self.bias = None if bias is None else F.pad(bias.float(), (0, padding))
        elements = _ELEMENTS[weight.dtype]
        padded = F.pad(weight, (0, -features % elements, 0, padding))
        self.packed = padded.view(-1, BLOCK, padded.shape[1] // elements, elements).transpose(1, 2).contiguous()

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.packed, self.scales, self.offsets, self.bias) if part is not None)

    def quantized(self) -> PackedWeights:
        """The same matrix in 8 bits, with a scale for each output feature: its largest element is 127."""
        if self.scales is not None:
            return self
        wide = self.packed.transpose(1, 2).flatten(2).flatten(0, 1).float()
        scales = (wide.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        whole = (wide / scales[:, None]).round()
        quantized = PackedWeights(whole.to(torch.int8), self.bias, columns=self.columns)
        quantized.scales = scales
        quantized.offsets = (-128 * whole.sum(1)).int()  # inputs are stored as bytes from 0 to 255, 128 too large
        return quantized


def pack_gated(weight: Tensor) -> Tensor:
    """Gates and as many values, [2 n, features], as 16 of each in turn, [2 m, features]: m is n rounded up to 16, with
    zeros."""
    half = BLOCK // 2
    parts = F.pad(weight.view(2, len(weight) // 2, -1), (0, 0, 0, -(len(weight) // 2) % half))
    return parts.view(2, -1, half, weight.shape[1]).transpose(0, 1).flatten(0, 2)
