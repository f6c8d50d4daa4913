"""Codes of 4 or 8 bits in words of 32, and the matrices that they make with the scales of their groups."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.weights.matrix import QuantizedMatrix, regular_groups
from models.files.json_values import Json, ModelError, integer
from models.layouts.weight_files import StoredTensor

INTEGERS = ("I32", "I64")
WORD_BITS = 32


def unpack(words: Tensor, bits: int) -> Tensor:
    """Split words into codes of 4 or 8 bits, the lowest bits first.

    words: [rows, words] int32. Returns [rows, words * 32 / bits] uint8.
    """
    # A copy: a part of one row or column counts as contiguous whatever its strides are, but has no view of bytes.
    octets = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    return octets if bits == 8 else split_bytes(octets)


def split_bytes(octets: Tensor) -> Tensor:
    """Split bytes into codes of 4 bits, the low ones first: [rows, n] uint8 to [rows, 2 n]."""
    return torch.stack((octets & 15, octets >> 4), -1).flatten(1)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes of 4 or 8 bits into words, the first in the lowest bits. Places that are left hold 0.

    codes: [rows, n] uint8. Returns [rows, words] int32.
    """
    each = WORD_BITS // bits
    padded = F.pad(codes.to(torch.int32), (0, -codes.shape[1] % each)).view(len(codes), -1, each)
    words = torch.zeros_like(padded[..., 0])
    for place in range(each):
        words |= padded[..., place] << (bits * place)
    return words


def count_words(codes: int, bits: int) -> int:
    """Count the words that hold this many codes."""
    return -(-codes * bits // WORD_BITS)


def words_of(codes: slice, bits: int) -> tuple[slice, slice]:
    """Return the words that hold a range of codes, and the range that it is of the codes in these words."""
    each = WORD_BITS // bits
    first = codes.start // each
    return slice(first, -(-codes.stop // each)), slice(codes.start - first * each, codes.stop - first * each)


def integer_matrix(
    codes: Tensor, bits: int, scales: Tensor, zeros: Tensor | None, groups: Tensor, group_size: int
) -> QuantizedMatrix:
    """Make the matrix scales * (codes - zeros).

    codes: [rows, features] uint8. scales: [rows, number of groups], floating-point. zeros: likewise, of integers; None:
    half of the codes are below 0. groups: [features], see QuantizedMatrix; some numbers may be missing.
    """
    exact = scales.float().contiguous()
    # int8 codes are those of uint8 less 128; int4 codes stay as they are.
    lowest = 128 if bits == 8 else 0
    signed = (codes ^ lowest).view(torch.int8) if bits == 8 else codes
    return grouped_matrix(
        f"int{bits}", signed, exact, None if zeros is None else (lowest - zeros.float()) * exact, groups, group_size
    )


def grouped_matrix(
    name: str, codes: Tensor, scales: Tensor, mins: Tensor | None, groups: Tensor, group_size: int
) -> QuantizedMatrix:
    """Make a matrix of the format `name`, and leave out groups without features; see QuantizedMatrix."""
    matrix = QuantizedMatrix(
        format=name,
        codes=codes.contiguous(),
        scales=scales,
        mins=None if mins is None else mins.contiguous(),
        groups=groups,
        group_size=group_size,
    )
    return matrix.cut(slice(None), slice(None))


def parse_group_size(settings: Json, default: int | None = None) -> int:
    """Parse the number of features that share a scale; -1: all of a row. Raises ModelError."""
    group_size = integer(settings, "group_size", default, minimum=-1)
    if group_size == 0:
        raise ModelError("group_size 0 is neither a number of features nor -1")
    return group_size


def group_features(group_size: int, features: int) -> int:
    """Return the number of features of a group in rows of `features`; see parse_group_size."""
    return features if group_size == -1 else min(group_size, features)


def groups_of(features: int, group_size: int, index: StoredTensor | None) -> Tensor:
    """Return the group of each feature: [features] int64.

    index: a tensor that lists them; empty, or of one number that is 0 or -1, if the groups are regular, which they are
    without it. Raises ModelError: numbers of groups that do not exist, groups of more than `group_size` features.
    """
    regular = regular_groups(features, group_size)
    if index is None:
        return regular
    if index.shape != (0,):
        index.check((features,), INTEGERS)
    groups = index.read().to(torch.int64)
    if not len(groups) or not groups.any() or bool((groups == -1).all()):
        return regular
    lowest, highest, last = int(groups.min()), int(groups.max()), int(regular[-1])
    if lowest < 0 or highest > last:
        raise ModelError(f"{index.where} names groups from {lowest} to {highest}, expected 0 to {last}")
    largest = int(torch.bincount(groups).max())
    if largest > group_size:
        raise ModelError(f"{index.where} has {largest} features in one group, expected at most {group_size}")
    return groups
