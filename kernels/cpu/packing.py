"""Layouts of weight matrices that the CPU kernels read."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.weights.int4_weights import LEVELS
from kernels.weights.matrix import DenseMatrix, Matrix, QuantizedMatrix, grouped_order, narrowed, zero_points

BLOCK = 32
"""Number of output features that are packed together; same as BLOCK of csrc/kernels.h."""
_ELEMENTS = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 2, torch.int8: 4}
"""Number of neighbouring input features in a 32-bit word."""
_INT4_FEATURES = 8
"""Number of input features in a word of 4-bit codes."""
_WORDS = 16
"""Words per row come in groups of so many: an AMX tile's width."""
_PAIR = 2
"""Number of neighbouring input features whose 8-bit codes are packed together."""
_E4M3_SCALE = 256.0
"""Same as E4M3_SCALE of csrc/kernels.h."""
_E4M3_NAN = 0x7F


class Packed(Protocol):
    """A weight matrix in the layout of one kind of product."""

    @property
    def kind(self) -> str:
        """Kind of the product, see CpuKernels.linear."""

    @property
    def operands(self) -> tuple[Tensor | int | None, ...]:
        """Arguments of the product's operator, from the weights to the number of columns."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""

    @property
    def order(self) -> Tensor | None:
        """Order of features that the operator takes, [features] int64; None: that of the matrix."""

    def arrange(self, x: Tensor) -> Tensor:
        """Return the input, [rows, features], in the order of features that the operator takes."""


class PackedWeights:
    """A weight matrix in the layout that `CpuKernels.linear` reads: blocks of BLOCK output features, and in them words
    of neighbouring input features, [blocks, words, BLOCK, elements of a word]. It takes as much memory as the matrix,
    rounded up to whole blocks of 16 words. All instruction sets read it, whether for few rows or many.
    """

    order: Tensor | None = None

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, scales: Tensor | None = None, *, columns: int | None = None
    ) -> None:
        """weight: [n, features] float32, bfloat16, float16, or int8 with scales. bias: [n]. scales: [n] float32.
        columns: of the result, if not n."""
        rows, self.features = weight.shape
        self.columns = rows if columns is None else columns
        padding = -rows % BLOCK
        self.bias = None if bias is None else F.pad(bias.float(), (0, padding))
        self.scales = self.offsets = None
        if scales is not None:
            self.scales = F.pad(scales, (0, padding))
            sums = -128 * weight.sum(1, dtype=torch.int32)  # inputs are stored as bytes from 0 to 255: 128 is added
            self.offsets = F.pad(sums, (0, padding))
        elements = _ELEMENTS[weight.dtype]
        padded = F.pad(weight, (0, -self.features % (_WORDS * elements), 0, padding))
        self.packed = padded.view(-1, BLOCK, padded.shape[1] // elements, elements).transpose(1, 2).contiguous()

    @property
    def kind(self) -> str:
        return "products" if self.scales is None else "products_int8"

    @property
    def operands(self) -> tuple[Tensor | int | None, ...]:
        return self.packed, self.scales, self.offsets, self.bias, self.features, self.columns

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.packed, self.scales, self.offsets, self.bias) if part is not None)

    def arrange(self, x: Tensor) -> Tensor:
        return x


class PackedInt4:
    """A matrix of int4 in blocks of BLOCK output features, and in them words of two codes per byte: [blocks, words,
    BLOCK, 4 bytes]. The low halves of a word's bytes are the codes of four neighbouring input features, the high halves
    those of the next four. Each group of features takes as many words.

    scales: [blocks, groups, BLOCK] float16 if it holds them exactly, else float32. zeros: likewise minima, or codes of
    0 in uint8 where all minima are such a multiple of their scale, or None for 8.
    """

    kind = "products_int4"

    def __init__(self, matrix: QuantizedMatrix, bias: Tensor | None = None, *, columns: int | None = None) -> None:
        """bias: [n]. columns: of the result, if not n."""
        rows, features = matrix.shape
        self.columns = rows if columns is None else columns
        size = matrix.group_size + -matrix.group_size % _INT4_FEATURES
        order = grouped_order(matrix.groups, size)
        codes = matrix.codes
        if order is not None:
            order = torch.where(order < 0, features, order)
            codes = _in_order(codes, order)
        self.features, self.order = codes.shape[1], order
        codes = F.pad(codes, (0, -self.features % size, 0, -rows % BLOCK))
        words = codes.view(len(codes) // BLOCK, BLOCK, codes.shape[1] // _INT4_FEATURES, 2, _INT4_FEATURES // 2)
        self.codes = (words[:, :, :, 0] | words[:, :, :, 1] << 4).transpose(1, 2).contiguous()
        self.scales = _in_blocks(narrowed(matrix.scales))
        self.zeros = None if matrix.mins is None else _in_blocks(_zeros(matrix.scales, matrix.mins))
        self.bias = None if bias is None else F.pad(bias.float(), (0, -rows % BLOCK))

    @property
    def operands(self) -> tuple[Tensor | int | None, ...]:
        return self.codes, self.scales, self.zeros, self.bias, self.features, self.columns

    @property
    def nbytes(self) -> int:
        parts = (self.codes, self.scales, self.zeros, self.bias, self.order)
        return sum(part.nbytes for part in parts if part is not None)

    def arrange(self, x: Tensor) -> Tensor:
        return x if self.order is None else _in_order(x, self.order)


class PackedCoded:
    """A matrix of 8-bit codes whose products take inputs as they are, in blocks of BLOCK output features, and in them
    pairs of neighbouring input features: [blocks, pairs, BLOCK, _PAIR]. All groups have the same number of features, an
    even one, and each has its scales, [blocks, groups, BLOCK].

    All instruction sets read it, for inputs of any dtype.
    """

    kind = "products_coded"

    def __init__(self, matrix: QuantizedMatrix, bias: Tensor | None = None, *, columns: int | None = None) -> None:
        """matrix: of format int8 or fp8, without minima. bias: [n]. columns: of the result, if not n."""
        assert matrix.mins is None
        self.e4m3 = matrix.format == "fp8"
        rows, features = matrix.shape
        self.columns = rows if columns is None else columns
        groups, size = matrix.scales.shape[1], matrix.group_size + -matrix.group_size % _PAIR
        codes, scales = matrix.codes.view(torch.uint8), matrix.scales
        order = grouped_order(matrix.groups, size)
        if order is None:
            self.features, self.order = features, None
            codes = F.pad(codes, (0, groups * size - features))
        else:
            self.features, self.order = groups * size, torch.where(order < 0, features, order)
            codes = _in_order(codes, self.order)
        if self.e4m3:
            nan = ((codes & _E4M3_NAN) == _E4M3_NAN).view(-1, groups, size).any(2)
            scales = (scales * _E4M3_SCALE).masked_fill(nan, torch.nan)
        padding = -rows % BLOCK
        codes = F.pad(codes, (0, 0, 0, padding))
        self.packed = codes.view(-1, BLOCK, codes.shape[1] // _PAIR, _PAIR).transpose(1, 2).contiguous()
        self.scales = _in_blocks(scales)
        self.bias = None if bias is None else F.pad(bias.float(), (0, padding))

    @property
    def operands(self) -> tuple[Tensor | int | None, ...]:
        return self.packed, self.e4m3, self.scales, self.bias, self.features, self.columns

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.packed, self.scales, self.bias, self.order) if part is not None)

    def arrange(self, x: Tensor) -> Tensor:
        return x if self.order is None else _in_order(x, self.order)


def _in_order(x: Tensor, order: Tensor) -> Tensor:
    """Return the columns of x in an order; one past the last is zeros."""
    return F.pad(x, (0, 1)).index_select(1, order)


def can_pack(matrix: Matrix) -> bool:
    """Whether there is a layout for a matrix: for all but one of 8-bit codes with minima."""
    return not isinstance(matrix, QuantizedMatrix) or matrix.format == "int4" or matrix.mins is None


def pack(
    matrix: Matrix, bias: Tensor | None = None, *, gated: bool = False
) -> PackedWeights | PackedInt4 | PackedCoded:
    """Lay out a matrix for its product; bias and gated: see Ops.linear."""
    columns = matrix.shape[0] // 2 if gated else None
    if gated and bias is not None:
        bias = pack_gated(bias[:, None])[:, 0]
    if isinstance(matrix, DenseMatrix):
        return PackedWeights(pack_gated(matrix.weight) if gated else matrix.weight, bias, columns=columns)
    assert isinstance(matrix, QuantizedMatrix)
    if gated:
        codes = matrix.codes.view(torch.uint8) if matrix.format == "fp8" else matrix.codes
        codes, scales = pack_gated(codes), pack_gated(matrix.scales)
        matrix = replace(
            matrix, codes=codes, scales=scales, mins=None if matrix.mins is None else pack_gated(matrix.mins)
        )
    if matrix.format == "int4":
        return PackedInt4(matrix, bias, columns=columns)
    if not matrix.rounds_inputs:
        return PackedCoded(matrix, bias, columns=columns)
    return PackedWeights(matrix.codes, bias, matrix.scales[:, 0], columns=columns)


def _in_blocks(numbers: Tensor) -> Tensor:
    """Lay out numbers of groups, [n, groups], as [blocks, groups, BLOCK]."""
    padded = F.pad(numbers, (0, 0, 0, -len(numbers) % BLOCK))
    return padded.view(len(padded) // BLOCK, BLOCK, padded.shape[1]).transpose(1, 2).contiguous()


def _zeros(scales: Tensor, mins: Tensor) -> Tensor:
    """Return the codes of 0 in uint8 where they are codes exactly, else the minima; both: [n, groups] float32."""
    zeros = zero_points(scales, mins, LEVELS)
    return narrowed(mins) if zeros is None else zeros.to(torch.uint8)


def pack_gated(weight: Tensor) -> Tensor:
    """Interleave gates and as many values, [2 n, features], 16 of each in turn, to [2 m, features].

    m is n rounded up to a multiple of 16; padding is zero.
    """
    half = BLOCK // 2
    parts = F.pad(weight.view(2, len(weight) // 2, -1), (0, 0, 0, -(len(weight) // 2) % half))
    return parts.view(2, -1, half, weight.shape[1]).transpose(0, 1).flatten(0, 2)
