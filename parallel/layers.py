"""Tensor-parallel layers: each holds one rank's shard of its weights, and declares the shard where it allocates it.

`weight_slots()` lists the storage of norms and biases, and `matrix_slots()` the places of matrices, with their share of
a checkpoint's tensors. Loading a model fills each of them; no other code depends on how weights are sharded.

Activations are [tokens, features]. Between layers they are whole on every rank. Inside a column-row pair (q/k/v and o,
gate/up and down) each rank holds its own features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.ops import Gate
from kernels.weights.matrix import DenseMatrix, Matrix
from kernels.weights.weight_format import FORMATS
from parallel.matrix_layer import MatrixLayer, MatrixPart, Placement
from parallel.module import MatrixSlot, Module, WeightSlot
from parallel.split import HeadSplit, Range, split


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


def _columns(
    prefix: str, names: Sequence[str], sizes: Sequence[int], kept: Sequence[slice], joined: str
) -> list[Columns]:
    """List the parts of a fused product. joined: name of the matrix that has all of them, one above the other, in a
    checkpoint; empty: each has its own."""
    if not joined:
        return [Columns(f"{prefix}.{name}", size, mine) for name, size, mine in zip(names, sizes, kept, strict=True)]
    first = [sum(sizes[:i]) for i in range(len(sizes))]
    return [
        Columns(f"{prefix}.{joined}", sum(sizes), slice(start + part.start, start + part.stop))
        for start, part in zip(first, kept, strict=True)
    ]


class ColumnLinear(MatrixLayer):
    """Linear layer with sharded output features; can fuse checkpoint tensors with the same input into one product."""

    def __init__(
        self, parts: Sequence[Columns], in_features: int, *, bias: bool, place: Placement, gated: Gate | None = None
    ) -> None:
        self._columns = tuple(parts)
        features = slice(0, in_features)
        super().__init__(
            [MatrixPart(part.name, (part.total, in_features), part.kept, features) for part in parts],
            bias=bias,
            place=place,
            gated=gated,
        )

    def weight_slots(self) -> Iterator[WeightSlot]:
        if self._bias is not None:
            sizes = [part.size for part in self._columns]
            for part, bias in zip(self._columns, self._bias.split_with_sizes(sizes), strict=True):
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
        joined: str = "",
    ) -> None:
        """joined: see models.model_config.WeightNames.qkv."""
        heads, kv_heads = mine.heads.slice(head_dim), mine.kv_heads.slice(head_dim)
        sizes = [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim]
        parts = _columns(prefix, ("q_proj", "k_proj", "v_proj"), sizes, (heads, kv_heads, kv_heads), joined)
        super().__init__(parts, hidden_size, bias=bias, place=place)
        self._head_dim = head_dim

    def project(self, x: Tensor) -> Tensor:
        """x: [tokens, hidden_size]. Returns [tokens, heads + 2 kv_heads, head_dim]: this rank's queries, keys and
        values."""
        return self(x).view(x.shape[0], -1, self._head_dim)


class GateUpLinear(ColumnLinear):
    """The two projections of a gated feed-forward network in one product, sharded by intermediate feature:
    activation(gate) * up."""

    def __init__(
        self,
        prefix: str,
        hidden_size: int,
        intermediate_size: int,
        *,
        mine: slice,
        bias: bool,
        place: Placement,
        activation: Gate = "silu",
        names: tuple[str, str] = ("gate_proj", "up_proj"),
        joined: str = "",
    ) -> None:
        """mine: the intermediate features that this rank holds. names: of gate and up in a checkpoint. joined: see
        models.model_config.WeightNames.gate_up."""
        parts = _columns(prefix, names, [intermediate_size] * 2, [mine] * 2, joined)
        super().__init__(parts, hidden_size, bias=bias, place=place, gated=activation)


class RowLinear(MatrixLayer):
    """Linear layer with sharded input features; one all-reduce sums the ranks' parts."""

    def __init__(
        self, name: str, in_features: int, out_features: int, *, mine: slice, bias: bool, place: Placement
    ) -> None:
        """mine: the input features that this rank holds."""
        self._name, rows = name, slice(0, out_features)
        super().__init__([MatrixPart(name, (out_features, in_features), rows, mine)], bias=bias, place=place)
        if place.group.size > 1:
            self._fused_bias = None  # added after the sum over ranks: once, not once per rank

    def weight_slots(self) -> Iterator[WeightSlot]:
        if self._bias is not None:
            size = len(self._bias)
            yield WeightSlot(self._bias, f"{self._name}.bias", (size,), (slice(0, size),))

    def __call__(self, x: Tensor) -> Tensor:
        """x: [tokens, this rank's features]. Returns [tokens, out_features], whole on every rank."""
        if self._place.group.size == 1:
            return self.linear(x)
        y = self._place.group.all_reduce(self.linear(x))
        return y if self._bias is None else y.add_(self._bias)


class RMSNorm(Module):
    """Root-mean-square norm over the last dimension, whole on every rank; computed in float32 or wider.

    weight: [size], with the offset that was added to the checkpoint's.
    """

    def __init__(self, name: str, size: int, *, eps: float, place: Placement, offset: float = 0.0) -> None:
        self._name, self._ops, self._offset = name, place.ops, offset
        self.weight, self.eps = place.empty(size), eps

    def weight_slots(self) -> Iterator[WeightSlot]:
        shape = tuple(self.weight.shape)
        yield WeightSlot(self.weight, f"{self._name}.weight", shape, (slice(0, shape[0]),), self._offset)

    def __call__(self, x: Tensor, delta: Tensor | None) -> Tensor:
        """Add delta, if not None, to x [tokens, size] in place. Returns the norm of the sum."""
        return self._ops.norm(x, delta, self.weight, self.eps)


class HeadsNorm(Module):
    """Root-mean-square norm over the elements of all heads of the model, sharded by head (OLMo 2, arXiv 2501.00656)."""

    def __init__(
        self, name: str, num_heads: int, head_dim: int, mine: Range, counts: bool, *, eps: float, place: Placement
    ) -> None:
        """mine: heads that this rank holds. counts: whether this rank is the one, of those that hold them, that adds
        them to the sum over ranks."""
        self._name, self._place, self._counts, self._eps = name, place, counts, eps
        self._shape, self._index = (num_heads * head_dim,), (mine.slice(head_dim),)
        self.weight = place.empty(mine.size * head_dim)

    def weight_slots(self) -> Iterator[WeightSlot]:
        yield WeightSlot(self.weight, f"{self._name}.weight", self._shape, self._index)

    def __call__(self, x: Tensor) -> Tensor:
        """x: [tokens, this rank's elements], contiguous. Returns the same shape."""
        if self._place.group.size == 1:
            return self._place.ops.norm(x, None, self.weight, self._eps)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        squares = wide.square().sum(-1, keepdim=True) * self._counts
        mean = self._place.group.all_reduce(squares) / self._shape[0]
        return (wide * (mean + self._eps).rsqrt() * self.weight).to(x.dtype)


class VocabEmbedding(Module):
    """Token embeddings, sharded by token id, in the model's precision."""

    def __init__(self, name: str, vocab_size: int, hidden_size: int, *, place: Placement, shared: bool = False) -> None:
        """shared: whether an LM head takes the weights too."""
        self.vocab: Range = split(vocab_size, place.group.size)[place.group.rank]
        self._name, self._shape = name, (vocab_size, hidden_size)
        self._group, self._shared = place.group, shared
        self._stored: Matrix | None = None
        self.weight = place.empty(self.vocab.size, hidden_size)

    def matrix_slots(self) -> Iterator[MatrixSlot]:
        index = (self.vocab.slice(), slice(0, self._shape[1]))
        yield MatrixSlot(f"{self._name}.weight", self._shape, index, index, self._fill)

    def _fill(self, matrix: Matrix) -> None:
        self.weight.copy_(matrix.dense(self.weight.dtype))
        if self._shared and not isinstance(matrix, DenseMatrix):
            self._stored = matrix

    def take_matrix(self) -> Matrix:
        """Return the weights for the head that shares them: as they were stored, or this layer's own storage. Once."""
        stored, self._stored = self._stored, None
        return stored or DenseMatrix(self.weight)

    def __call__(self, token_ids: Tensor) -> Tensor:
        """token_ids: [tokens] int64, in the whole vocabulary. Returns [tokens, hidden_size], whole on every rank."""
        if self._group.size == 1:
            return F.embedding(token_ids, self.weight)
        local = token_ids - self.vocab.start
        elsewhere = (local < 0) | (local >= self.vocab.size)
        rows = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return self._group.all_reduce(rows.masked_fill_(elsewhere[:, None], 0))


class LMHead(MatrixLayer):
    """LM head: computes the logits of this rank's shard of the vocabulary."""

    def __init__(
        self, name: str, vocab_size: int, hidden_size: int, *, tied: VocabEmbedding | None, place: Placement
    ) -> None:
        """tied: embedding whose weight the head uses; the head then has no slots of its own."""
        self.vocab: Range = tied.vocab if tied else split(vocab_size, place.group.size)[place.group.rank]
        part = MatrixPart(name, (vocab_size, hidden_size), self.vocab.slice(), slice(0, hidden_size))
        super().__init__([part], bias=False, place=place, wide=True)
        self._tied = (tied,) if tied else ()  # in a tuple, so that it is no child

    def matrix_slots(self) -> Iterator[MatrixSlot]:
        if not self._tied:
            yield from super().matrix_slots()

    def prepare(self) -> None:
        for embedding in self._tied:
            self._fill(0, embedding.take_matrix())
        super().prepare()

    def _format_of(self, choice: str) -> str:
        return FORMATS[choice].head

    @property
    def shares_embedding(self) -> bool:
        """Whether the head multiplies by the embedding's own storage."""
        return bool(self._tied) and self.linear.references_weights

    def __call__(self, x: Tensor) -> Tensor:
        """x: [tokens, hidden_size], whole. Returns [tokens, this rank's vocabulary], float32 or wider."""
        return self.linear(x)
