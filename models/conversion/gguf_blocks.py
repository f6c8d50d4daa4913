"""Blocks of quantized GGUF tensors, as matrices with the same codes and the same values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.weights.matrix import QuantizedMatrix, regular_groups

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class _Block:
    """Content of some blocks. codes: [blocks, features]. scales, mins: [blocks, groups of a block] float32."""

    codes: Array
    scales: Array
    mins: Array | None = None


@dataclass(frozen=True, slots=True)
class _Kind:
    """A type of blocks. size: bytes of one. unpack: takes blocks, [blocks, size] uint8."""

    size: int
    features: int
    group_size: int
    format: str
    unpack: Callable[[Array], _Block]


def _q4_0(blocks: Array) -> _Block:
    return _Block(_low_and_high(blocks[:, 2:]), _half(blocks[:, :2]))


def _q4_1(blocks: Array) -> _Block:
    return _Block(_low_and_high(blocks[:, 4:]), _half(blocks[:, :2]), _half(blocks[:, 2:4]))


def _q5_0(blocks: Array) -> _Block:
    high = np.unpackbits(blocks[:, 2:6], axis=1, bitorder="little")
    return _Block((_low_and_high(blocks[:, 6:]) | high << 4).astype(np.int8) - np.int8(16), _half(blocks[:, :2]))


def _q8_0(blocks: Array) -> _Block:
    return _Block(blocks[:, 2:].view(np.int8), _half(blocks[:, :2]))


def _q4_k(blocks: Array) -> _Block:
    """Eight groups, whose scales and minima are 6-bit multiples of the block's own."""
    scale, least, packed = _half(blocks[:, :2]), _half(blocks[:, 2:4]), blocks[:, 4:16]
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & 0x3F, (third & 0x0F) | (first >> 2 & 0x30)], axis=1)
    mins = np.concatenate([second & 0x3F, third >> 4 | (second >> 2 & 0x30)], axis=1)
    codes = _low_and_high(blocks[:, 16:].reshape(-1, 32)).reshape(len(blocks), -1)
    return _Block(codes, scale * scales.astype(np.float32), -(least * mins.astype(np.float32)))


def _q6_k(blocks: Array) -> _Block:
    """Sixteen groups, whose scales are 8-bit multiples of the block's own."""
    count = len(blocks)
    low = _low_and_high(blocks[:, :128].reshape(-1, 64)).reshape(count, -1)
    high = blocks[:, 128:192].reshape(count, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    scales = _half(blocks[:, 208:]) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    return _Block((low | high.reshape(count, -1) << 4).astype(np.int8) - np.int8(32), scales)


def _half(data: Array) -> Array:
    """Read one float16 of each block: [blocks, 2] bytes. Returns [blocks, 1] float32."""
    return np.ascontiguousarray(data).view("<f2").astype(np.float32)


def _low_and_high(data: Array) -> Array:
    """Return the low halves of each row's bytes, and then the high halves."""
    return np.concatenate([data & 0x0F, data >> 4], axis=1)


_KINDS: Mapping[str, _Kind] = {
    "Q4_0": _Kind(18, 32, 32, "int4", _q4_0),
    "Q4_1": _Kind(20, 32, 32, "int4", _q4_1),
    "Q4_K": _Kind(144, 256, 32, "int4", _q4_k),
    "Q5_0": _Kind(22, 32, 32, "int8", _q5_0),
    "Q6_K": _Kind(210, 256, 16, "int8", _q6_k),
    "Q8_0": _Kind(34, 32, 32, "int8", _q8_0),
}

BLOCK_TYPES = frozenset(_KINDS)
"""Names of the types that have a matrix of the same values. Others have minima and more than 4 bits, or values that
are no multiples of a scale."""


def read_blocks(data: Array, kind: str) -> QuantizedMatrix:
    """Return the matrix that the blocks of type `kind`, one of BLOCK_TYPES, hold. data: [rows, bytes] uint8."""
    form = _KINDS[kind]
    rows, features = len(data), data.shape[1] // form.size * form.features
    block = form.unpack(np.ascontiguousarray(data).reshape(-1, form.size))

    def tensor(values: Array) -> Tensor:
        return torch.from_numpy(np.array(values.reshape(rows, -1)))

    return QuantizedMatrix(
        format=form.format,
        codes=tensor(block.codes),
        scales=tensor(block.scales),
        mins=None if block.mins is None else tensor(block.mins),
        groups=regular_groups(features, form.group_size),
        group_size=form.group_size,
    )
