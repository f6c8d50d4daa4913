"""Python interface of the CPU kernels."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention.base import Ballot
from kernels.cpu.choice import KernelChoice
from kernels.cpu.compiler import InstructionSet, KernelsUnavailable, build_kernels, build_operators, supported

BLOCK = 32
"""Number of output features that are packed together; same as BLOCK of csrc/kernels.h."""
SEGMENT = 1024
"""Number of KV slots of a row that are one piece of work in attention, and that rows share; same as SEGMENT of
csrc/attention_cut.h."""
_ELEMENTS = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 2, torch.int8: 4}
"""Number of neighbouring input features in a 32-bit word."""
_WORDS = 16
"""Words per row come in groups of so many: an AMX tile's width."""


def open_set(folder: Path | None, target: InstructionSet) -> tuple[Path, int]:
    """Compile the kernels of an instruction set if needed, and load them.

    Returns the library and the address of its table of kernels. Raises KernelsUnavailable, also if the system refuses
    the instructions.
    """
    library = build_operators(folder)
    try:
        torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
        library = build_kernels(target, folder)
        return library, int(torch.ops.magicdec_cpu.open(str(library)))
    except KernelsUnavailable:
        raise
    except (OSError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        if "does not permit" in reason:
            raise KernelsUnavailable(f"the system does not permit the instructions of {target.name}") from error
        # The file is truncated, or its folder does not allow execution.
        raise KernelsUnavailable(f"{library} cannot be loaded; remove it to have it built anew: {reason}") from error


class CpuKernels:
    """Compiled kernels. All tensors are on the CPU.

    dtypes are float32, bfloat16 or float16 unless stated otherwise. A row's results depend on that row alone, not on
    other rows, their number, or the number of threads.
    """

    def __init__(self, folder: Path | None, choice: KernelChoice | InstructionSet | None = None) -> None:
        """folder: where compiled libraries are kept; None: use only those of the installation. choice: sets that this
        processor has, or one for everything; None: the best. Raises KernelsUnavailable."""
        if not isinstance(choice, KernelChoice):
            choice = KernelChoice.all_of(choice or supported()[0])
        tables, names = {}, []
        for target in choice.sets:
            library, tables[target.name] = open_set(folder, target)
            names.append(library.stem.removeprefix("kernels-"))
        self.name = f"{'+'.join(names)}-{choice.digest}"
        """Key of measurements: it names the libraries, and what each is used for."""
        self._attention_table, self._rest = tables[choice.attention.name], tables[choice.rest.name]
        self._prefetch = (choice.prefetch.blocks, choice.prefetch.to_l2)
        # By whether weights have 8 bits: the kernels, and the number of rows from which on tiles multiply.
        self._products = (
            (tables[choice.products.name], choice.tiles_from),
            (tables[choice.products_int8.name], choice.tiles_from_int8),
        )
        ops = torch.ops.magicdec_cpu
        # Looked up once: a model makes hundreds of calls per token.
        self._attention, self._linear, self._norm = ops.attention.default, ops.linear.default, ops.norm.default
        self._rotary, self._sample, self._best = ops.rotary.default, ops.sample.default, ops.best.default
        self._summarise, self._bounds = ops.summarise.default, ops.bounds.default

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        queries: Tensor,
        lengths: Tensor,
        pages: Tensor,
        scale: float,
        ballot: Ballot | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute attention; see kernels.attention.base.

        q: [tokens, heads, head_dim], head_dim a multiple of 16. k, v: [pages, kv_heads, page_size, head_dim]. queries,
        lengths: [rows] int64. pages: [rows, width] or [rows, kv_heads, width] int64. Returns o, in q's dtype, and the
        log-sum-exp [tokens, heads] float32, and writes the votes of `ballot`.
        """
        counted = (None, 1, None) if ballot is None else (ballot.voters, ballot.unit, ballot.votes)
        o, sums = self._attention(
            self._attention_table, q, k, v, queries, lengths, pages, scale, *self._prefetch, *counted
        )
        return o, sums

    def linear(self, x: Tensor, weights: PackedWeights, *, silu_mul: bool = False, float_out: bool = False) -> Tensor:
        """Compute x w^T + bias: [rows, features] to [rows, columns], in x's dtype, or in float32 with float_out.

        weights: in x's dtype, or int8; then x is quantized too, with one scale per row from its largest element.
        silu_mul: weights are gates and as many values (`pack_gated`), and the result is silu(gate) * value.
        """
        table, tiles_from = self._products[weights.scales is not None]
        y: Tensor = self._linear(
            table,
            x,
            weights.packed,
            weights.scales,
            weights.offsets,
            weights.bias,
            weights.features,
            weights.columns,
            silu_mul,
            float_out,
            tiles_from,
        )
        return y

    def norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        """Add delta to x in place, and return the root-mean-square norm of the sum, all [rows, size] of one dtype."""
        out: Tensor = self._norm(self._rest, x, delta, weight, eps)
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

        qkv: [tokens, heads + 2 kv_heads, head_dim]. cos, sin: [positions, head_dim / 2] float32, for all positions.
        positions, slots: [tokens] int64. k, v: [pages, kv_heads, page_size, head_dim]. norms: weights of the norms of
        queries and of keys, [head_dim] each, and their eps; applied before the rotation.
        """
        of_q, of_k, eps = norms or (None, None, 0.0)
        self._rotary(self._rest, qkv, cos, sin, positions, slots, k, v, of_q, of_k, eps)

    def sample(
        self, logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor, first: int
    ) -> tuple[Tensor, Tensor]:
        """Apply the coupled sampling rule: each row's largest logit / temperature + noise, and its token id.

        logits: [rows, size] float32, of the tokens from `first` on. temperature: [rows] float32; 0 selects the largest
        logit. seeds, positions: [rows] int64. Returns [rows] float32 and [rows] int64, the lowest id among equals.
        """
        values, tokens = self._sample(self._rest, logits, temperature, seeds, positions, first)
        return values, tokens

    def best(self, x: Tensor, count: int) -> Tensor:
        """Return the indices of each row's `count` largest numbers, the largest first, and equal ones in order.

        x: [rows, size] float32, contiguous, without NaN. Returns [rows, count] int64.
        """
        indices: Tensor = self._best(self._rest, x, count)
        return indices

    def summarise(self, k: Tensor, pages: Tensor, low: Tensor, high: Tensor) -> None:
        """Summarise pages; see Ops.summarise. head_dim is a multiple of 16, low and high have equal strides."""
        self._summarise(self._rest, k, pages, low, high)

    def bounds(self, q: Tensor, pages: Tensor, low: Tensor, high: Tensor, first: int, ends: Tensor) -> Tensor:
        """Bound products; see Ops.bounds. head_dim is a multiple of 16, low and high have equal strides."""
        scores: Tensor = self._bounds(self._rest, q, pages, low, high, first, ends)
        return scores


class PackedWeights:
    """A weight matrix in the layout that `CpuKernels.linear` reads: blocks of BLOCK output features, and in them words
    of neighbouring input features, [blocks, words, BLOCK, elements of a word]. It takes as much memory as the matrix,
    rounded up to whole blocks of 16 words. All instruction sets read it, whether for few rows or many.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, columns: int | None = None) -> None:
        """weight: [n, features] float32, bfloat16, float16 or int8. bias: [n]. columns: of the result, if not n."""
        rows, self.features = weight.shape
        self.columns = rows if columns is None else columns
        self.scales: Tensor | None = None
        self.offsets: Tensor | None = None
        padding = -rows % BLOCK
        self.bias = None if bias is None else F.pad(bias.float(), (0, padding))
        elements = _ELEMENTS[weight.dtype]
        padded = F.pad(weight, (0, -self.features % (_WORDS * elements), 0, padding))
        self.packed = padded.view(-1, BLOCK, padded.shape[1] // elements, elements).transpose(1, 2).contiguous()

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.packed, self.scales, self.offsets, self.bias) if part is not None)

    def quantized(self) -> PackedWeights:
        """Return the same matrix in 8 bits, with one scale per output feature: its largest element becomes 127."""
        if self.scales is not None:
            return self
        wide = self.packed.transpose(1, 2).flatten(2).flatten(0, 1)[:, : self.features].float()
        scales = (wide.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        whole = (wide / scales[:, None]).round()
        quantized = PackedWeights(whole.to(torch.int8), self.bias, columns=self.columns)
        quantized.scales = scales
        quantized.offsets = (-128 * whole.sum(1)).int()  # inputs are stored as bytes from 0 to 255: 128 is added
        return quantized


def pack_gated(weight: Tensor) -> Tensor:
    """Interleave gates and as many values, [2 n, features], 16 of each in turn, to [2 m, features].

    m is n rounded up to a multiple of 16; padding is zero.
    """
    half = BLOCK // 2
    parts = F.pad(weight.view(2, len(weight) // 2, -1), (0, 0, 0, -(len(weight) // 2) % half))
    return parts.view(2, -1, half, weight.shape[1]).transpose(0, 1).flatten(0, 2)
