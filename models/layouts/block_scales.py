"""Scales of rectangular blocks of a matrix: of all of it, of rows, of groups of features, or of tiles."""

from __future__ import annotations

import torch
from torch import Tensor

from models.files.json_values import ModelError
from models.layouts.weight_files import StoredTensor
from models.weights import FLOATS

POWERS = ("F8_E8M0", "U8")
"""Types of scales that are powers of two: exponents in 8 bits, 127 for 1."""


def check_scales(tensor: StoredTensor, shape: tuple[int, int], block: tuple[int, int]) -> None:
    """Raise ModelError unless there is a scale for each block of a matrix. Dimensions of 1 at the end may be left
    out.

    shape: rows and features of the matrix. block: those of a block; the last one of a row or column may be cut short.
    """
    expected = _counts(shape, block)
    fits: set[tuple[int, ...]] = {expected, expected[:1]} if expected[1] == 1 else {expected}
    if expected == (1, 1):
        fits.add(())
    if tensor.shape not in fits:
        raise ModelError(f"{tensor.where} has shape {list(tensor.shape)}, expected {list(expected)}")
    tensor.check(tensor.shape, (*FLOATS, *POWERS))


def read_blocks(tensor: StoredTensor, shape: tuple[int, int], block: tuple[int, int], rows: slice) -> Tensor:
    """Read what a tensor holds for the blocks of some rows, in its own type: [rows, number of groups]."""
    counts, height = _counts(shape, block), block[0]
    first, last = rows.start // height, -(-rows.stop // height)
    if len(tensor.shape) == 2:
        values = tensor.read(slice(first, last), slice(0, counts[1]))
    else:
        values = tensor.read().reshape(counts)[first:last]
    return values[torch.arange(rows.start, rows.stop) // height - first]


def read_scales(tensor: StoredTensor, shape: tuple[int, int], block: tuple[int, int], rows: slice) -> Tensor:
    """Read the scales of some rows: [rows, number of groups] float32."""
    values = read_blocks(tensor, shape, block, rows)
    return (values.view(torch.float8_e8m0fnu) if tensor.dtype == "U8" else values).float()


def _counts(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])
