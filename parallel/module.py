"""Base class of a model's layers, and the walk over their tree that fills, prepares and quantizes weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from torch import Tensor


@dataclass(frozen=True, slots=True)
class WeightSlot:
    """Storage for this rank's part of one checkpoint tensor.

    tensor: the storage, of shape `full_shape` cut by `index`; often a view into fused storage.
    source: the checkpoint tensor's name; no two slots of a model share one.
    index: one slice per dimension.
    """

    tensor: Tensor
    source: str
    full_shape: tuple[int, ...]
    index: tuple[slice, ...]


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
        """Yield the storage to fill before `prepare`, and its place in a checkpoint."""
        for child in self.children():
            yield from child.weight_slots()

    def prepare(self, int8: bool = False) -> None:
        """Convert filled matrices into the form that the device multiplies by; int8: rounded to 8 bits. Call once; a
        layer can be called only afterwards."""
        for child in self.children():  # one at a time, so that few weights are in memory twice
            child.prepare(int8)

    def quantized(self) -> Self:
        """Return the same layer with 8-bit matrices, sharing all else."""
        twin = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Module):
                setattr(twin, name, value.quantized())
            elif isinstance(value, list) and value and isinstance(value[0], Module):
                setattr(twin, name, [each.quantized() for each in value])
        return twin

    @property
    def matrix_bytes(self) -> int:
        """Bytes of prepared matrices; a forward reads all of them."""
        return sum(child.matrix_bytes for child in self.children())
