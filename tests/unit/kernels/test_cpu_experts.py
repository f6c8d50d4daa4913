"""Mixtures of experts of the compiled CPU kernels, with biases and every gate, against plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.cpu.cpu_ops import CpuExperts, CpuOps
from kernels.cpu.library import CpuKernels
from kernels.ops import Gate, Linear, Ops
from kernels.reference_ops import REFERENCE
from kernels.weights.matrix import DenseMatrix, Matrix, QuantizedMatrix, regular_groups
from kernels.weights.weight_format import FORMATS
from tests.support.gates import GATES

FEATURES, SIZE, COUNT = 64, 48, 5


def int8_in_groups(rows: int, features: int) -> QuantizedMatrix:
    """A matrix as MXFP4 files are read: exact, in groups of 32 features."""
    groups = regular_groups(features, 32)
    return QuantizedMatrix(
        format="int8",
        codes=torch.randint(-12, 13, (rows, features), dtype=torch.int8),
        scales=2.0 ** torch.randint(-7, -5, (rows, int(groups[-1]) + 1)),
        mins=None,
        groups=groups,
        group_size=32,
    )


def draw(form: str, rows: int, features: int) -> Matrix:
    if form == "int8 in groups":
        return int8_in_groups(rows, features)
    weight = torch.randn(rows, features) * 3 * features**-0.5
    return FORMATS[form].quantize(weight.bfloat16() if form == "dense" else weight)


def network(ops: Ops, pair: tuple[Matrix, Matrix], biases: tuple[Tensor, Tensor], gate: Gate) -> tuple[Linear, Linear]:
    return ops.linear(pair[0], biases[0], gated=gate), ops.linear(pair[1], biases[1], wide=True)


def wide(pair: tuple[Matrix, Matrix]) -> tuple[Matrix, Matrix]:
    a, b = (DenseMatrix(each.dense(torch.float32)) if each.format == "dense" else each for each in pair)
    return a, b


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("form", [*FORMATS, "int8 in groups"])
def test_experts_with_biases(kernels: CpuKernels, form: str, gate: Gate) -> None:
    """One operator computes what plain torch does, and each token alone has the same bits."""
    torch.manual_seed(0)
    pairs = [(draw(form, 2 * SIZE, FEATURES), draw(form, FEATURES, SIZE)) for _ in range(COUNT)]
    biases = [(torch.randn(2 * SIZE).bfloat16(), torch.randn(FEATURES).bfloat16()) for _ in range(COUNT)]
    x, scores = torch.randn(30, FEATURES).bfloat16(), torch.randn(30, COUNT)
    ops = CpuOps(kernels)
    networks = [network(ops, pair, added, gate) for pair, added in zip(pairs, biases, strict=True)]
    ours = ops.experts(networks, per_token=2, normalised=True)
    assert isinstance(ours, CpuExperts)
    exact = [
        network(REFERENCE, wide(pair), (a.float(), b.float()), gate) for pair, (a, b) in zip(pairs, biases, strict=True)
    ]
    y, expected = ours(x, scores), REFERENCE.experts(exact, per_token=2, normalised=True)(x.float(), scores)
    tolerance = 0.1 if form in ("int8", "int4") else 0.03  # with these two, inputs are rounded to 8 bits
    assert (y - expected).abs().max() < tolerance * expected.std()
    assert torch.equal(torch.cat([ours(x[row : row + 1], scores[row : row + 1]) for row in range(len(x))]), y)
