"""Python interface of the CPU kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.attention.base import Ballot
from kernels.cpu.choice import KernelChoice
from kernels.cpu.compiler import InstructionSet, KernelsUnavailable, build_kernels, build_operators, supported
from kernels.cpu.packing import Packed
from kernels.kv.kv_pool import SealedKV
from kernels.ops import Gate

SEGMENT = 1024
"""Number of KV slots of a row that are one piece of work in attention, and that rows share; same as SEGMENT of
csrc/attention_cut.h."""
_SEALED_KINDS = {"int8": 0, "int4x2": 1, "upper": 2}
"""Numbers of `Sealed` in csrc/kernels.h, by kind of layer (LayerKV.kind)."""
_GATES: dict[Gate | None, int] = {None: 0, "silu": 1, "gelu_tanh": 2, "clamped_silu": 3}
"""Numbers of `Gate` in csrc/kernels.h."""
READABLE_KV = frozenset({"dense", "int8", "int4x2"})
"""Formats of KV that the kernels read (see kernels.kv.kv_bits)."""


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
        ops = torch.ops.magicdec_cpu
        # Looked up once: a model makes hundreds of calls per token.
        self._attention, self._norm = ops.attention.default, ops.norm.default
        self._rotary, self._sample, self._best = ops.rotary.default, ops.sample.default, ops.best.default
        self._experts = ops.experts.default
        self._summarise, self._bounds = ops.summarise.default, ops.bounds.default
        # By kind of product: the operator, the kernels, and the operator's last arguments.
        self._products: dict[str, tuple[Callable[..., Tensor], int, tuple[int, ...]]] = {
            "products": (ops.linear.default, tables[choice.products.name], (choice.tiles_from,)),
            "products_int8": (ops.linear.default, tables[choice.products_int8.name], (choice.tiles_from_int8,)),
            "products_int4": (ops.linear_int4.default, tables[choice.products_int4.name], ()),
            "products_coded": (ops.linear_coded.default, tables[choice.products.name], ()),
        }

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
        sealed: SealedKV | None = None,
        window: int = 0,
        sinks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute attention; see kernels.attention.base.

        q: [tokens, heads, head_dim], head_dim a multiple of 16. k, v: [pages, kv_heads, page_size, head_dim]. queries,
        lengths: [rows] int64. pages: [rows, width] or [rows, kv_heads, width] int64. sealed: pages that come before
        those of k and v. window: see AttentionBatch; pages that no query sees may have any ids. sinks: [heads] float32,
        see LayerKV. Returns o, in q's dtype, and the log-sum-exp [tokens, heads] float32, and writes the votes of
        `ballot`.
        """
        counted = (None, 1, None) if ballot is None else (ballot.voters, ballot.unit, ballot.votes)
        records: tuple[Tensor | None, Tensor | None, int] = (None, None, 0)
        if sealed is not None:
            records = sealed.k, sealed.v, _SEALED_KINDS[sealed.kind]
        o, sums = self._attention(
            *(self._attention_table, q, k, v, queries, lengths, pages, scale, *self._prefetch, window, sinks),
            *counted,
            *records,
        )
        return o, sums

    def linear(self, x: Tensor, weights: Packed, *, gate: Gate | None = None, float_out: bool = False) -> Tensor:
        """Compute x w^T + bias: [rows, features] to [rows, columns], in x's dtype, or in float32 with float_out.

        weights: in x's dtype, or of fewer bits. With int8 of one scale per output feature and with int4, x is rounded
        to 8 bits too, with one scale per row, or one per group of features as the weights have, from its largest
        element. gate: weights are gates and as many values (`pack_gated`), and the result joins both, as
        kernels.ops.Gate says.
        """
        product, table, last = self._products[weights.kind]
        return product(table, weights.arrange(x), *weights.operands, _GATES[gate], float_out, *last)

    def networks(self, products: Sequence[tuple[Packed, Packed]], gate: Gate) -> Any:
        """Join networks for `experts`. products: gates and values of each (`pack_gated`), and what multiplies their
        results; without an order of features."""
        joined = torch.classes.magicdec_cpu.Networks()
        for pair in products:
            for weights, gated in zip(pair, (gate, None), strict=True):
                _, table, last = self._products[weights.kind]
                *operands, features, columns = weights.operands
                kind, tensors, number = _network_product(weights.kind, operands, last)
                joined.add(kind, table, *tensors, features, columns, _GATES[gated], number)
        return joined

    def experts(self, networks: Any, x: Tensor, scores: Tensor, per_token: int, normalised: bool) -> Tensor:
        """Compute a mixture of experts; see kernels.ops.Experts. networks: joined. scores: float32."""
        total: Tensor = self._experts(networks, x, scores, per_token, normalised)
        return total

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


def _network_product(
    kind: str, operands: Sequence[Tensor | int | None], last: tuple[int, ...]
) -> tuple[int, list[Tensor | int | None], int]:
    """Return a product's kind, four tensors, and last number as `Networks.add` of csrc/ops_experts.h takes them.

    operands: Packed.operands without sizes. last: the last arguments of the product's operator.
    """
    if kind == "products_int4":
        return 1, list(operands), 0
    if kind == "products_coded":
        codes, e4m3, scales, bias = operands
        assert isinstance(e4m3, int)
        return 2, [codes, scales, None, bias], int(e4m3)
    return 0, list(operands), last[0]
