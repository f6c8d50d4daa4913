"""Blocks of GGUF tensors have the values that the gguf package computes, to the bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from hypothesis import given
from hypothesis import strategies as st

from models.conversion.gguf_blocks import BLOCK_TYPES, read_blocks
from tests.support.gguf_files import random_blocks

FORMATS = {"Q4_0": "int4", "Q4_1": "int4", "Q4_K": "int4", "Q5_0": "int8", "Q6_K": "int8", "Q8_0": "int8"}


def test_types() -> None:
    assert FORMATS.keys() == BLOCK_TYPES


@pytest.mark.parametrize("kind", sorted(BLOCK_TYPES))
@given(rows=st.integers(1, 5), blocks=st.integers(1, 3), seed=st.integers(0, 2**32 - 1))
def test_values(kind: str, rows: int, blocks: int, seed: int) -> None:
    """Scales of blocks may be negative: codes of Q4_0 count from the largest weight on."""
    number = GGMLQuantizationType[kind]
    features = blocks * gguf.GGML_QUANT_SIZES[number][0]
    data = random_blocks(kind, rows, features, seed)
    matrix = read_blocks(data, kind)
    assert matrix.format == FORMATS[kind]
    assert matrix.shape == (rows, features)
    assert matrix.group_size == (16 if kind == "Q6_K" else 32)
    assert matrix.scales.shape == (rows, features // matrix.group_size)
    assert matrix.codes.dtype == (torch.uint8 if matrix.format == "int4" else torch.int8)
    assert torch.equal(matrix.dense(torch.float32), torch.from_numpy(gguf.dequantize(data, number)))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q8_0"])
def test_rounded_weights(kind: str) -> None:
    """What the gguf package writes is read back within half a step."""
    weight = np.random.default_rng(0).standard_normal((6, 64)).astype(np.float32)
    number = GGMLQuantizationType[kind]
    matrix = read_blocks(gguf.quantize(weight, number), kind)
    error = (matrix.dense(torch.float32) - torch.from_numpy(weight)).abs()
    steps = matrix.scales.abs()[:, matrix.groups]
    assert (error <= steps * (1.01 if kind in ("Q4_0", "Q5_0") else 0.51)).all()
