"""Layout of codes of few bits in a GPU's memory, and of their scales: one copy for any number of rows.

A word has 16 bits, as many as an input: 4 codes of 4 bits or 2 of 8 bits. A line is LINE words of one column of the
product (a row of the matrix): the lowest codes of its words are LINE consecutive features, the next ones the LINE after
them. So tensor cores take a tile of words like one of inputs, and the codes are unpacked in the registers where they
are multiplied. Lines of the same features lie one after the other, column by column: any tile of columns is one
contiguous block, which a program copies 16 bytes at a time.

Columns are padded to a multiple of COLUMNS, features to whole lines. Inputs are 0 there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.weights.matrix import SYMMETRIC_ZERO, QuantizedMatrix, grouped_order, zero_points

LINE = 32
"""Words of a line."""
COLUMNS = 128
"""Columns of the widest tile."""
_ALIGNMENT = 16
"""Features of a group are a multiple of this: those of one instruction of tensor cores."""
_LARGEST_ZERO = 16
"""Largest zero point that is subtracted from a code without rounding in any dtype; some checkpoints have 16."""
_SMALLEST_SCALE = 1e-30
"""Smaller scales, of groups of zeros, count as 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FewBitWeights:
    """A matrix as GPUs keep it.

    features: of inputs, after `order`, without the padding of lines. codes: [lines, padded columns, LINE] int16 words.
    scales: [groups, padded columns], either float32, or int32 with two numbers per word: a float16 scale in the low
    half and the code of 0 in the high half (words of 32 bits are the smallest that are copied asynchronously). Float32
    scales have the same code of 0 in all groups. mins: likewise, float32, added to each weight; None: 0. group:
    features of each group; 0: all, which then have no mins. order: the feature of inputs that stands at each place,
    their number where there is none; None: the order of inputs.
    """

    format: str
    columns: int
    features: int
    codes: Tensor
    scales: Tensor
    mins: Tensor | None
    group: int
    order: Tensor | None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Those of its fields that are tensors."""
        tensors = {"codes": self.codes, "scales": self.scales, "mins": self.mins, "order": self.order}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> FewBitWeights:
        """Return the same layout with other tensors of those names."""
        codes, scales = tensors["codes"], tensors["scales"]
        return replace(self, codes=codes, scales=scales, mins=tensors.get("mins"), order=tensors.get("order"))

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in self.tensors.values())

    @property
    def has_zeros(self) -> bool:
        return self.scales.dtype == torch.int32

    @property
    def features_per_line(self) -> int:
        return LINE * codes_per_word(self.format)

    def gather(self, x: Tensor) -> Tensor:
        """Return x [rows, features of inputs] in the order of the codes, with 0 where there is none."""
        if self.order is None:
            return x
        return F.pad(x, (0, 1)).index_select(1, self.order)


def codes_per_word(format: str) -> int:
    return 4 if format == "int4" else 2


def lay_out(matrix: QuantizedMatrix) -> FewBitWeights:
    """Lay out a matrix on its device."""
    group = -(-matrix.group_size // _ALIGNMENT) * _ALIGNMENT
    order = grouped_order(matrix.groups, group)
    codes, features = _bytes_of(matrix), matrix.shape[1]
    if order is not None:
        codes = codes.index_select(1, order.clamp(min=0))
        order, features = order.remainder(features + 1), len(order)
    count = codes_per_word(matrix.format)
    padded = F.pad(codes, (0, -features % (LINE * count), 0, -len(codes) % COLUMNS))
    groups = max(matrix.scales.shape[1], -(-padded.shape[1] // group))
    scales = _by_group(matrix.scales, groups)
    mins = None if matrix.mins is None else _by_group(matrix.mins, groups)
    words = _with_zeros(scales, mins) if mins is not None and matrix.format == "int4" else None
    if words is not None:
        scales, mins = words, None
    return FewBitWeights(
        format=matrix.format,
        columns=matrix.shape[0],
        features=features,
        codes=_lines(padded, count),
        scales=scales,
        mins=mins,
        group=0 if matrix.scales.shape[1] == 1 and mins is None else group,
        order=order,
    )


def with_minima(weights: FewBitWeights) -> FewBitWeights:
    """Return int4 weights with minima in place of codes of 0, with the same values; others as they are."""
    if weights.format != "int4" or weights.mins is not None:
        return weights
    if weights.has_zeros:
        scales = weights.scales.to(torch.int16).view(torch.float16).float()
        mins = (weights.scales >> 16) * -scales
    else:
        scales, mins = weights.scales, weights.scales * -SYMMETRIC_ZERO
    group = weights.group or len(weights.codes) * weights.features_per_line
    return replace(weights, scales=scales, mins=mins, group=group)


def _bytes_of(matrix: QuantizedMatrix) -> Tensor:
    return matrix.codes if matrix.codes.dtype == torch.uint8 else matrix.codes.view(torch.uint8)


def _lines(codes: Tensor, count: int) -> Tensor:
    """Pack codes [columns, features], padded, `count` per word."""
    parts = codes.view(len(codes), -1, count, LINE)
    words = torch.zeros_like(parts[:, :, 0], dtype=torch.int16)
    for part in range(count):  # wraps around in the last one, which has the sign
        words |= parts[:, :, part].to(torch.int16) << (16 // count * part)
    return words.transpose(0, 1).contiguous()


def _by_group(scales: Tensor, groups: int) -> Tensor:
    """Return scales [columns, groups] group by group, with padded columns, and 0 for groups of padding."""
    return F.pad(scales, (0, groups - scales.shape[1], 0, -len(scales) % COLUMNS)).t().contiguous()


def _with_zeros(scales: Tensor, mins: Tensor) -> Tensor | None:
    """Return words of scales and codes of 0, if they hold them: if mins = -zero * scale and scales are float16."""
    zeros = zero_points(scales, mins, _LARGEST_ZERO)
    if zeros is None:
        return None
    scales = scales.masked_fill(scales < _SMALLEST_SCALE, 0)
    half = scales.half()
    if not torch.equal(half.float(), scales):
        return None
    return half.view(torch.int16).to(torch.int32) & 0xFFFF | zeros.to(torch.int32) << 16
