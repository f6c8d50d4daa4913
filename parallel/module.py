"""Base class of a model's layers, and the walk over their tree that fills and prepares weights."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from kernels.weights.matrix import Matrix


@dataclass(frozen=True, slots=True)
class WeightSlot:
    """Storage for this rank's part of one checkpoint tensor.

    tensor: the storage, of shape `full_shape` cut by `index`; often a view into fused storage.
    source: the checkpoint tensor's name; no two slots of a model share the same part of one.
    index: one slice per dimension.
    offset: added to the checkpoint's values.
    """

    tensor: Tensor
    source: str
    full_shape: tuple[int, ...]
    index: tuple[slice, ...]
    offset: float = 0.0


@dataclass(frozen=True, slots=True)
class MatrixSlot:
    """Place for this rank's part of one checkpoint matrix.

    source: name of its weight in a checkpoint; no two slots of a model share the same part of one.
    full_shape: of the whole matrix. index: rows and features of this rank's part. reads: those that `fill` takes: more
    than the part where its rounding depends on others. fill: takes them, once. rounds: whether weights may be rounded
    to few bits.
    """

    source: str
    full_shape: tuple[int, int]
    index: tuple[slice, slice]
    reads: tuple[slice, slice]
    fill: Callable[[Matrix], None]
    rounds: bool = True


class Module:
    """A layer. Its child layers are its attributes of this class, or lists of them, in the order they were set.

    Each method below recurses into all children; a layer with weights of its own overrides those that concern them.
    """

    def children(self) -> Iterator[Module]:
        for value in vars(self).values():
            if isinstance(value, Module):
                yield value
            elif isinstance(value, list):
                yield from (each for each in value if isinstance(each, Module))

    def weight_slots(self) -> Iterator[WeightSlot]:
        """Yield the storage of norms and biases, to fill first, and its place in a checkpoint."""
        for child in self.children():
            yield from child.weight_slots()

    def matrix_slots(self) -> Iterator[MatrixSlot]:
        """Yield the places of matrices, to fill after all storage. Filled matrices go to the device one at a time, so
        few are in memory twice."""
        for child in self.children():
            yield from child.matrix_slots()

    def prepare(self) -> None:
        """Finish what filling has begun. Call once; a layer can be called only afterwards."""
        for child in self.children():
            child.prepare()

    def drafting(self) -> Self:
        """Return the same layer with the matrices of drafts, sharing all else; see matrix_layer.WeightChoice."""
        twin = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Module):
                setattr(twin, name, value.drafting())
            elif isinstance(value, list) and value and isinstance(value[0], Module):
                setattr(twin, name, [each.drafting() for each in value])
        return twin

    @property
    def matrix_formats(self) -> Counter[str]:
        """Number of weights of this layer's own matrices in each format that they are multiplied in."""
        return sum((child.matrix_formats for child in self.children()), Counter())

    @property
    def matrix_bytes(self) -> int:
        """Bytes of this layer's own matrices; a forward reads all of them."""
        return sum(child.matrix_bytes for child in self.children())
