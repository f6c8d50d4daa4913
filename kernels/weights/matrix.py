"""Weight matrices as checkpoints and quantisation make them, before a device lays them out for its products."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

TINY = torch.finfo(torch.float32).tiny
"""Smallest scale, of weights that are all zero."""
SYMMETRIC_ZERO = 8
"""Code of 0 of int4 without minima."""


class Matrix(Protocol):
    """A weight matrix [rows, features] in some format. Its tensors are not written to."""

    @property
    def format(self) -> str:
        """Name of the format, one of `Ops.weight_formats`."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and features."""

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""

    def cut(self, rows: slice, features: slice) -> Matrix:
        """Return a part of the matrix, with the same values."""

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the values, computed in float32 or wider and rounded once to `dtype`: [rows, features]."""

    def is_finite(self, dtype: torch.dtype) -> bool:
        """Whether all values are finite in `dtype`."""

    def to(self, device: torch.device) -> Matrix:
        """Return the matrix on a device."""

    def owned(self) -> Matrix:
        """Return the matrix in memory that torch allocated. Other memory may be that of a file, and changes with it."""


def _owned(tensor: Tensor) -> Tensor:
    return tensor if tensor.untyped_storage().resizable() else tensor.clone()


def is_finite(tensor: Tensor) -> bool:
    """Whether a floating-point tensor holds neither NaN nor infinite values."""
    return not tensor.numel() or all(math.isfinite(bound) for bound in torch.aminmax(tensor))


@dataclass(frozen=True, slots=True)
class DenseMatrix:
    """A matrix of floating-point numbers. weight: [rows, features]."""

    weight: Tensor
    format = "dense"

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    def cut(self, rows: slice, features: slice) -> DenseMatrix:
        return DenseMatrix(self.weight[rows, features])

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.weight.to(dtype)

    def is_finite(self, dtype: torch.dtype) -> bool:
        return is_finite(self.weight.to(dtype))

    def to(self, device: torch.device) -> DenseMatrix:
        return DenseMatrix(self.weight.to(device))

    def owned(self) -> DenseMatrix:
        return DenseMatrix(_owned(self.weight))


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedMatrix:
    """A matrix of codes of few bits. The features of a row form groups, and each group has a scale of its own:

        weight[r, f] = scales[r, groups[f]] * (code[r, f] - zero) + mins[r, groups[f]]

    format: of the codes: int4 (uint8 from 0 to 15), int8 or fp8 (float8_e4m3fn). codes: [rows, features], one per
    element. scales: [rows, number of groups] float32. mins: likewise; None: 0, and then the zero of int4 is 8, which
    otherwise is 0, as it always is for other formats. groups: [features] int64, the group of each feature. group_size:
    largest number of features of a group. rounds_inputs: whether products may round inputs to 8 bits too, with one
    scale per row of them, and sum integers; only for int8 with one group and no minima.
    """

    format: str
    codes: Tensor
    scales: Tensor
    mins: Tensor | None
    groups: Tensor
    group_size: int
    rounds_inputs: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in (self.codes, self.scales, self.mins, self.groups) if each is not None)

    @property
    def zero(self) -> int:
        """Code of the weight 0 in a group without a minimum."""
        return SYMMETRIC_ZERO if self.format == "int4" and self.mins is None else 0

    def cut(self, rows: slice, features: slice) -> QuantizedMatrix:
        """Return a part of the matrix. Groups that are cut keep their scales; groups without features go."""
        kept, groups = torch.unique(self.groups[features], return_inverse=True)
        return replace(
            self,
            codes=self.codes[rows, features],
            scales=self.scales[rows][:, kept],
            mins=None if self.mins is None else self.mins[rows][:, kept],
            groups=groups,
        )

    def dense(self, dtype: torch.dtype) -> Tensor:
        values = self.codes.float() - self.zero
        values *= self.scales[:, self.groups]
        if self.mins is not None:
            values += self.mins[:, self.groups]
        return values.to(dtype)

    def is_finite(self, dtype: torch.dtype) -> bool:
        """See Matrix. Minima, and scales times the largest code, decide: values that only `dtype` cannot hold count as
        finite."""
        if not self.codes.numel():
            return True
        codes = self.codes.float() if self.codes.is_floating_point() else self.codes
        largest = max(abs(float(bound) - self.zero) for bound in torch.aminmax(codes))
        return is_finite(self.scales * largest) and (self.mins is None or is_finite(self.mins))

    def to(self, device: torch.device) -> QuantizedMatrix:
        return self._changed(lambda tensor: tensor.to(device))

    def owned(self) -> QuantizedMatrix:
        return self._changed(_owned)

    def _changed(self, change: Callable[[Tensor], Tensor]) -> QuantizedMatrix:
        tensors = {name: getattr(self, name) for name in ("codes", "scales", "mins", "groups")}
        changed: dict[str, Any] = {name: change(tensor) for name, tensor in tensors.items() if tensor is not None}
        return replace(self, **changed)


def narrowed(numbers: Tensor) -> Tensor:
    """Return float32 numbers, such as scales, in float16 if it holds all of them exactly."""
    halves = numbers.half()
    return halves if torch.equal(halves.float(), numbers) else numbers


def zero_points(scales: Tensor, mins: Tensor, largest: int) -> Tensor | None:
    """Return the codes of 0, whole numbers from 0 to `largest`, where all minima are exactly such a multiple of their
    scale; else None. All have the shape of `scales`, in float32."""
    zeros = torch.where(scales == 0, 0.0, (-mins / scales).round()).clamp(0, largest)
    return zeros if torch.equal(-zeros * scales, mins) else None


def regular_groups(features: int, size: int, *, first: int = 0) -> Tensor:
    """Return the groups of `features` features in order, each of `size` features. first: number of the first feature
    in its group."""
    return (torch.arange(first, first + features) // size).to(torch.int64)


def grouped_order(groups: Tensor, size: int) -> Tensor | None:
    """Return the order of features in which every group has `size` places, one after the other: [number of groups *
    size] int64, with -1 where a group has no feature left. None: that is the order they have, but for padding at the
    end.

    groups: [features], see QuantizedMatrix. Devices lay out codes in this order, with any code in the places that are
    left, and multiply by inputs of 0 there.
    """
    features, count = len(groups), int(groups.max()) + 1
    if torch.equal(groups, regular_groups(features, size).to(groups.device)):
        return None
    by_group = torch.argsort(groups, stable=True)
    sizes = torch.bincount(groups, minlength=count)
    within = torch.arange(features, device=groups.device) - (sizes.cumsum(0) - sizes)[groups[by_group]]
    order = torch.full((count * size,), -1, dtype=torch.int64, device=groups.device)
    order[groups[by_group] * size + within] = by_group
    return order


def join(parts: Sequence[Matrix]) -> Matrix | None:
    """Return one matrix with the rows of all parts, or None where they have no format or groups in common."""
    if len(parts) == 1:
        return parts[0]
    if all(isinstance(each, DenseMatrix) for each in parts):
        return DenseMatrix(torch.cat([each.weight for each in parts if isinstance(each, DenseMatrix)]))
    quantized = [each for each in parts if isinstance(each, QuantizedMatrix)]
    if len(quantized) < len(parts):
        return None
    first = quantized[0]
    for other in quantized[1:]:
        if other.rounds_inputs != first.rounds_inputs:
            return None
        if (other.format, other.group_size, other.mins is None) != (first.format, first.group_size, first.mins is None):
            return None
        if not torch.equal(other.groups, first.groups):
            return None
    mins = [each.mins for each in quantized if each.mins is not None]
    return replace(
        first,
        codes=torch.cat([each.codes for each in quantized]),
        scales=torch.cat([each.scales for each in quantized]),
        mins=torch.cat(mins) if mins else None,
    )
