"""Layer of one matrix product: takes the parts of its matrix from a checkpoint, and gives them to the device."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from kernels.ops import Gate, Linear, Ops
from kernels.reference_ops import REFERENCE
from kernels.weights.matrix import DenseMatrix, Matrix, join
from kernels.weights.weight_format import FORMATS, convert
from parallel.group import Group
from parallel.module import MatrixSlot, Module


@dataclass(frozen=True, slots=True)
class WeightChoice:
    """Formats of a model's matrices, names of kernels.weights.weight_format.FORMATS.

    own: None: as the checkpoint stores them. drafts: of a second set of matrices, with which the model drafts; None:
    there is none.
    """

    own: str | None = None
    drafts: str | None = None


AS_STORED = WeightChoice()


@dataclass(frozen=True, slots=True)
class Placement:
    """Group, dtype, device, arithmetic and weight formats of a model's layers."""

    group: Group
    dtype: torch.dtype
    device: torch.device
    ops: Ops = REFERENCE
    weights: WeightChoice = AS_STORED

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)


@dataclass(frozen=True, slots=True)
class MatrixPart:
    """A checkpoint matrix that a rank multiplies by, or its share of it.

    name: without `.weight`. full_shape: of the whole matrix. rows, features: this rank's share.
    """

    name: str
    full_shape: tuple[int, int]
    rows: slice
    features: slice


class JoinedLinear:
    """Products of several matrices with the same input, which have no format in common, side by side."""

    def __init__(self, parts: Sequence[Linear]) -> None:
        self._parts = tuple(parts)

    references_weights = False

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self._parts)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self._parts], dim=1)


class MatrixLayer(Module):
    """Layer of one matrix product. Fill all weight slots of a model before its matrix slots: a matrix goes to the
    device with its bias, as soon as all of its parts are there."""

    def __init__(
        self,
        parts: Sequence[MatrixPart],
        *,
        bias: bool,
        place: Placement,
        gated: Gate | None = None,
        wide: bool = False,
    ) -> None:
        """parts: one above the other. gated, wide: see Ops.linear."""
        self._place, self._gated, self._wide = place, gated, wide
        self._parts = tuple(parts)
        self._sizes = [part.rows.stop - part.rows.start for part in parts]
        self._filled: dict[int, tuple[Matrix, Matrix]] = {}  # by part, until all are there: own, of drafts
        self._bias = place.empty(sum(self._sizes)) if bias else None
        self._fused_bias = self._bias  # added by the matrix product itself
        self._linear: Linear | None = None
        self._draft_linear: Linear | None = None
        self._formats: Counter[str] = Counter()
        self._draft_formats: Counter[str] = Counter()

    def matrix_slots(self) -> Iterator[MatrixSlot]:
        for number, part in enumerate(self._parts):
            yield MatrixSlot(
                f"{part.name}.weight",
                part.full_shape,
                index=(part.rows, part.features),
                reads=(part.rows, self._features_to_read(part)),
                fill=lambda matrix, number=number: self._fill(number, matrix),  # type: ignore[misc]
            )

    def prepare(self) -> None:
        if self._linear is None:
            missing = [part.name for number, part in enumerate(self._parts) if number not in self._filled]
            raise RuntimeError(f"not filled: {', '.join(missing)}")

    def drafting(self) -> Self:
        twin = copy.copy(self)
        if self._draft_linear is not None:
            twin._linear, twin._formats = self._draft_linear, self._draft_formats
        return twin

    @property
    def matrix_formats(self) -> Counter[str]:
        return self._formats

    @property
    def matrix_bytes(self) -> int:
        return self.linear.nbytes

    @property
    def linear(self) -> Linear:
        assert self._linear is not None, "not prepared yet"
        return self._linear

    def _format_of(self, choice: str) -> str:
        """Return the format of this layer where that of the model's matrices is `choice`."""
        return choice

    def _wanted(self) -> list[str]:
        choice = self._place.weights
        return [self._format_of(name) for name in (choice.own, choice.drafts) if name is not None]

    def _features_to_read(self, part: MatrixPart) -> slice:
        spans = [part.features, *(FORMATS[name].spanned(part.features, part.full_shape[1]) for name in self._wanted())]
        return slice(min(span.start for span in spans), max(span.stop for span in spans))

    def _fill(self, number: int, matrix: Matrix) -> None:
        """Take part `number`, with the rows and features of MatrixSlot.reads."""
        part, choice = self._parts[number], self._place.weights
        start = self._features_to_read(part).start
        features = slice(part.features.start - start, part.features.stop - start)

        def held(wanted: str | None) -> Matrix:
            # A stored matrix in the wanted format keeps it, even in a head, which would be rounded to more bits.
            name = matrix.format if wanted in (None, matrix.format) else self._format_of(wanted)
            converted = convert(matrix, name, self._place.dtype)
            if not self._place.ops.takes(converted):  # as it is stored
                values = converted.dense(self._place.dtype)
                converted = DenseMatrix(values) if wanted is None else FORMATS[name].quantize(values)
            return converted.cut(slice(None), features).to(self._place.device)

        own = held(choice.own)
        self._filled[number] = own, own if choice.drafts is None else held(choice.drafts)
        if len(self._filled) == len(self._parts):
            pairs = [self._filled[each] for each in range(len(self._parts))]
            self._filled.clear()
            self._linear, self._formats = self._product([own for own, _ in pairs])
            if choice.drafts is not None and any(draft.format != own.format for own, draft in pairs):
                self._draft_linear, self._draft_formats = self._product([draft for _, draft in pairs])

    def _product(self, parts: list[Matrix]) -> tuple[Linear, Counter[str]]:
        """Give the matrices to the device. Returns their product, and the number of weights in each format."""
        ops, bias, formats = self._place.ops, self._fused_bias, Counter[str]()
        whole = join(parts)
        if whole is None and self._gated:  # the two halves are one operation
            whole = join([DenseMatrix(part.dense(self._place.dtype)) for part in parts])
        for matrix in parts if whole is None else [whole]:
            formats[matrix.format] += math.prod(matrix.shape)
        if whole is not None:
            return ops.linear(whole, bias, gated=self._gated, wide=self._wide), formats
        biases = [None] * len(parts) if bias is None else bias.split_with_sizes(self._sizes)
        products = [ops.linear(part, b, wide=self._wide) for part, b in zip(parts, biases, strict=True)]
        return JoinedLinear(products), formats
