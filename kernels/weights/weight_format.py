"""Formats that weights are rounded to when a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from kernels.weights.fp8_weights import Fp8Format
from kernels.weights.int4_weights import Int4Format
from kernels.weights.int8_weights import Int8Format
from kernels.weights.matrix import DenseMatrix, Matrix
from kernels.weights.weight_bits import HEAD_FORMATS


class WeightFormat(Protocol):
    """Format of a weight matrix. Rounding a matrix and cutting the result gives what rounding the part gives, if the
    part holds the features of `spanned`."""

    @property
    def name(self) -> str:
        """Name in settings, and `Matrix.format` of what `quantize` returns."""

    @property
    def head(self) -> str:
        """Name of the format of the LM head, whose errors cost more."""

    def spanned(self, features: slice, total: int) -> slice:
        """Return the features of a row, of `total`, on which the rounding of `features` depends."""

    def quantize(self, weight: Tensor) -> Matrix:
        """Round weights to nearest. weight: [rows, features], floating-point, finite."""


class DenseFormat:
    """Weights in the model's own precision."""

    name = "dense"
    head = HEAD_FORMATS[name]

    def spanned(self, features: slice, total: int) -> slice:
        return features

    def quantize(self, weight: Tensor) -> DenseMatrix:
        return DenseMatrix(weight)


FORMATS: Mapping[str, WeightFormat] = {
    each.name: each for each in (DenseFormat(), Int8Format(), Int4Format(minima=True), Fp8Format())
}
"""Formats by name in settings."""


def convert(matrix: Matrix, wanted: str, dtype: torch.dtype) -> Matrix:
    """Return the matrix in the format `wanted`: itself if it has it already, whatever its groups are.

    dtype: of dense weights.
    """
    if matrix.format == wanted != "dense":
        return matrix
    if wanted == "dense":
        return DenseMatrix(matrix.dense(dtype))
    return FORMATS[wanted].quantize(matrix.dense(torch.promote_types(dtype, torch.float32)))
