"""Tensor-parallel layers: each holds one rank's shard of its weights, and declares the shard where it allocates it.

`weight_slots()` lists the storage to fill and its place in a checkpoint. Loading a model copies
`checkpoint[slot.source][slot.index]` into `slot.tensor` for each slot; no other code depends on how weights are
sharded. Storage is uninitialised until then. After `prepare()` the slots are gone, unless the device multiplies by the
storage itself.

Activations are [tokens, features]. Between layers they are whole on every rank. Inside a column-row pair (q/k/v and o,
gate/up and down) each rank holds its own features.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.ops import Linear, Ops
from kernels.reference_ops import REFERENCE
from parallel.group import Group
from parallel.module import Module, WeightSlot
from parallel.split import HeadSplit, Range, split


@dataclass(frozen=True, slots=True)
class Placement:
    """Group, dtype, device and arithmetic of a model's layers."""

    group: Group
    dtype: torch.dtype
    device: torch.device
    ops: Ops = REFERENCE

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)


@dataclass(frozen=True, slots=True)
class Columns:
    """Output features that a rank computes of one checkpoint tensor pair (name.weight, name.bias).

    total: number of output features of the whole tensor. kept: this rank's slice of them.
    """

    name: str
    total: int
    kept: slice

    @property
    def size(self) -> int:
        size: int = self.kept.stop - self.kept.start
        return size


class _LinearLayer(Module):
    """Layer of one matrix product; subclasses list the slots to fill."""

    def __init__(
        self, rows: int, columns: int, *, bias: bool, place: Placement, gated: bool = False, wide: bool = False
    ) -> None:
        """rows: output features of this rank. columns: input features. gated, wide: see Ops.linear."""
        self._place, self._gated, self._wide = place, gated, wide
        self._weight: Tensor | None = place.empty(rows, columns)
        self._bias = place.empty(rows) if bias else None
        self._fused_bias = self._bias  # added by the matrix product itself
        self._linear: Linear | None = None

    @property
    def weight(self) -> Tensor:
        """The storage, [rows, columns]; released once the device has its own copy."""
        assert self._weight is not None, "prepared: no storage is left"
        return self._weight

    def prepare(self, int8: bool = False) -> None:
        linear = self._place.ops.linear(self.weight, self._fused_bias, gated=self._gated, wide=self._wide)
        self._linear = linear.quantized() if int8 else linear
        if not self._linear.references_weights:
            self._weight = None

    def quantized(self) -> Self:
        twin = copy.copy(self)
        twin._linear, twin._weight = self.linear.quantized(), None
        return twin

    @property
    def matrix_bytes(self) -> int:
        return self.linear.nbytes

    @property
    def linear(self) -> Linear:
        assert self._linear is not None, "not prepared yet"
        return self._linear


class ColumnLinear(_LinearLayer):
    """Linear layer with sharded output features; can fuse checkpoint tensors with the same input into one product."""

    def __init__(
        self, parts: Sequence[Columns], in_features: int, *, bias: bool, place: Placement, gated: bool = False
    ) -> None:
        self._parts = tuple(parts)
        self._sizes = [part.size for part in parts]
        self._in_features = in_features
        super().__init__(sum(self._sizes), in_features, bias=bias, place=place, gated=gated)

    def weight_slots(self) -> Iterator[WeightSlot]:
        columns = slice(0, self._in_features)
        for part, weight in zip(self._parts, self.weight.split_with_sizes(self._sizes), strict=True):
            shape = (part.total, self._in_features)
            yield WeightSlot(weight, f"{part.name}.weight", shape, (part.kept, columns))
        if self._bias is not None:
            for part, bias in zip(self._parts, self._bias.split_with_sizes(self._sizes), strict=True):
                yield WeightSlot(bias, f"{part.name}.bias", (part.total,), (part.kept,))

    def __call__(self, x: Tensor) -> Tensor:
        """x: [tokens, in_features], whole. Returns [tokens, this rank's features of all parts]."""
        return self.linear(x)


class QKVLinear(ColumnLinear):
    """Query, key and value projections in one product, sharded by attention head."""

    def __init__(
        self,
        prefix: str,
        hidden_size: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        mine: HeadSplit,
        bias: bool,
        place: Placement,
    ) -> None:
        heads, kv_heads = mine.heads.slice(head_dim), mine.kv_heads.slice(head_dim)
        parts = (
            Columns(f"{prefix}.q_proj", num_heads * head_dim, heads),
            Columns(f"{prefix}.k_proj", num_kv_heads * head_dim, kv_heads),
            Columns(f"{prefix}.v_proj", num_kv_heads * head_dim, kv_heads),
        )
        super().__init__(parts, hidden_size, bias=bias, place=place)
        self._head_dim = head_dim

    def project(self, x: Tensor) -> Tensor:
        """x: [tokens, hidden_size]. Returns [tokens, heads + 2 kv_heads, head_dim]: this rank's queries, keys and
        values."""
        return self(x).view(x.shape[0], -1, self._head_dim)


class GateUpLinear(ColumnLinear):
    """The two projections of a gated MLP in one product, sharded by intermediate feature: silu(gate) * up."""

    def __init__(
        self,
        prefix: str,
        hidden_size: int,
        intermediate_size: int,
        *,
        mine: slice,
        bias: bool,
        place: Placement,
    ) -> None:
        """mine: the intermediate features that this rank holds."""
        parts = [Columns(f"{prefix}.{name}", intermediate_size, mine) for name in ("gate_proj", "up_proj")]
        super().__init__(parts, hidden_size, bias=bias, place=place, gated=True)


class RowLinear(_LinearLayer):
    """Linear layer with sharded input features; one all-reduce sums the ranks' parts."""

    def __init__(
        self, name: str, in_features: int, out_features: int, *, mine: slice, bias: bool, place: Placement
    ) -> None:
        """mine: the input features that this rank holds."""
        self._name, self._shape, self._mine = name, (out_features, in_features), mine
        super().__init__(out_features, mine.stop - mine.start, bias=bias, place=place)
        if place.group.size > 1:
            self._fused_bias = None  # added after the sum over ranks: once, not once per rank

    def weight_slots(self) -> Iterator[WeightSlot]:
        rows = slice(0, self._shape[0])
        yield WeightSlot(self.weight, f"{self._name}.weight", self._shape, (rows, self._mine))
        if self._bias is not None:
            yield WeightSlot(self._bias, f"{self._name}.bias", self._shape[:1], (rows,))

    def __call__(self, x: Tensor) -> Tensor:
        """x: [tokens, this rank's features]. Returns [tokens, out_features], whole on every rank."""
        if self._place.group.size == 1:
            return self.linear(x)
        y = self._place.group.all_reduce(self.linear(x))
        return y if self._bias is None else y.add_(self._bias)


class RMSNorm(Module):
    """Root-mean-square norm over the last dimension, whole on every rank; computed in float32 or wider."""

    def __init__(self, name: str, size: int, *, eps: float, place: Placement) -> None:
        self._name, self._ops = name, place.ops
        self.weight, self.eps = place.empty(size), eps

    def weight_slots(self) -> Iterator[WeightSlot]:
        shape = tuple(self.weight.shape)
        yield WeightSlot(self.weight, f"{self._name}.weight", shape, (slice(0, shape[0]),))

    def __call__(self, x: Tensor, delta: Tensor | None) -> Tensor:
        """Add delta, if not None, to x [tokens, size] in place. Returns the norm of the sum."""
        return self._ops.norm(x, delta, self.weight, self.eps)


class VocabEmbedding(Module):
    """Token embeddings, sharded by token id."""

    def __init__(self, name: str, vocab_size: int, hidden_size: int, *, place: Placement) -> None:
        self.vocab: Range = split(vocab_size, place.group.size)[place.group.rank]
        self._name, self._shape = name, (vocab_size, hidden_size)
        self._group = place.group
        self.weight = place.empty(self.vocab.size, hidden_size)

    def weight_slots(self) -> Iterator[WeightSlot]:
        index = (self.vocab.slice(), slice(0, self._shape[1]))
        yield WeightSlot(self.weight, f"{self._name}.weight", self._shape, index)

    def __call__(self, token_ids: Tensor) -> Tensor:
        """token_ids: [tokens] int64, in the whole vocabulary. Returns [tokens, hidden_size], whole on every rank."""
        if self._group.size == 1:
            return F.embedding(token_ids, self.weight)
        local = token_ids - self.vocab.start
        elsewhere = (local < 0) | (local >= self.vocab.size)
        rows = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return self._group.all_reduce(rows.masked_fill_(elsewhere[:, None], 0))


class LMHead(_LinearLayer):
    """LM head: computes the logits of this rank's shard of the vocabulary."""

    def __init__(
        self, name: str, vocab_size: int, hidden_size: int, *, tied: VocabEmbedding | None, place: Placement
    ) -> None:
        """tied: embedding whose weight the head uses; the head then has no storage and no slots of its own."""
        self.vocab: Range = tied.vocab if tied else split(vocab_size, place.group.size)[place.group.rank]
        self._name, self._shape = name, (vocab_size, hidden_size)
        self._is_tied = tied is not None
        super().__init__(0 if tied else self.vocab.size, hidden_size, bias=False, place=place, wide=True)
        if tied:
            self._weight = tied.weight

    def weight_slots(self) -> Iterator[WeightSlot]:
        if not self._is_tied:
            index = (self.vocab.slice(), slice(0, self._shape[1]))
            yield WeightSlot(self.weight, f"{self._name}.weight", self._shape, index)

    @property
    def shares_embedding(self) -> bool:
        """Whether the head multiplies by the embedding's own storage."""
        return self._is_tied and self.linear.references_weights

    def __call__(self, x: Tensor) -> Tensor:
        """x: [tokens, hidden_size], whole. Returns [tokens, this rank's vocabulary], float32 or wider."""
        return self.linear(x)
