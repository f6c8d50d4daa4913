"""The tree of layers that makes up a model, and the one walk over it: weights to fill, to prepare, to quantize."""

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

    Each method below does its work in all children; a layer with weights of its own overrides what concerns them.
    """

    def children(self) -> Iterator[Module]:
        for value in vars(self).values():
            if isinstance(value, Module):
                yield value
            elif isinstance(value, list):
                yield from (each for each in value if isinstance(each, Module))

    def weight_slots(self) -> Iterator[WeightSlot]:
        """Storage to fill before `prepare`, and its place in a checkpoint."""
        for child in self.children():
            yield from child.weight_slots()

    def prepare(self, int8: bool = False) -> None:
        """Convert filled matrices into the form that the device multiplies by; int8: rounded to 8 bits. Call once; a
        layer can be called only afterwards."""
        for child in self.children():  # one after the other, so that little is in memory twice
            child.prepare(int8)

    def quantized(self) -> Self:
        """The same layer with matrices of 8 bits, sharing all else."""
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
