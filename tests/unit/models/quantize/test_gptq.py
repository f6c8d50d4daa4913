"""GPTQ against its definition, and against rounding to nearest."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels.weights.int4_weights import LEVELS, Int4Format
from kernels.weights.matrix import QuantizedMatrix
from models.quantize.gptq_rounding import DAMPENING, gptq
from tests.support.profiles import each_value, examples


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated(tokens: int, features: int) -> Tensor:
    """Inputs, most of whose variance has few directions."""
    return drawn(tokens, features // 4, seed=1) @ drawn(features // 4, features, seed=2) + drawn(tokens, features)


def equal(a: QuantizedMatrix, b: QuantizedMatrix) -> bool:
    same_mins = a.mins is b.mins is None or (a.mins is not None and b.mins is not None and torch.equal(a.mins, b.mins))
    return torch.equal(a.codes, b.codes) and torch.equal(a.scales, b.scales) and same_mins


@pytest.mark.parametrize("symmetric", [False, True])
def test_less_error_than_nearest(symmetric: bool) -> None:
    weight, x, int4 = drawn(48, 256, seed=3), correlated(600, 256), Int4Format(64, symmetric)

    def error(matrix: QuantizedMatrix) -> float:
        return float((x @ (matrix.dense(torch.float32) - weight).t()).square().sum())

    assert error(int4.quantize(weight)) >= 1.3 * error(gptq(weight, x.t() @ x, int4))


@pytest.mark.parametrize(
    ("sizes", "symmetric"), each_value([(40, 8), (300, 64), (290, 144), (30, 64)], [False, True]), ids=str
)
def test_the_columns_left_make_up_for_the_error(sizes: tuple[int, int], symmetric: bool) -> None:
    """Before a column is rounded, those from it on are what gives the least squared error with those before it. sizes:
    features, and features per group."""
    features, size = sizes
    rows, int4 = 5, Int4Format(size, symmetric)
    weight, x = drawn(rows, features, seed=3), correlated(400, features)
    hessian = (x.t() @ x).double()
    found = gptq(weight, hessian, int4)
    dampened = hessian + DAMPENING * hessian.diagonal().mean() * torch.eye(features)
    rounded = torch.empty(rows, features, dtype=torch.float64)
    differing = 0
    for column in range(features):
        change = rounded[:, :column] - weight[:, :column]
        left = torch.linalg.solve(dampened[column:, column:], dampened[column:, :column] @ change.t()).t()
        now = weight[:, column:] - left
        if column % size == 0:
            group = now[:, :size].float()
            padded = torch.cat([group, torch.zeros(rows, size - group.shape[1])], 1)
            scales, zeros = (each[:, 0] for each in int4.scales_and_zeros(padded[:, None]))
            torch.testing.assert_close(found.scales[:, column // size], scales, rtol=2e-3, atol=0)
        codes = ((now[:, 0] / scales).round() + zeros).clamp(0, LEVELS)
        differing += int((codes != found.codes[:, column]).sum())
        rounded[:, column] = found.dense(torch.float64)[:, column]
    assert differing <= rows * features // 100  # numbers halfway between two codes


@given(
    rows=st.integers(1, 9),
    features=st.integers(1, 300),
    size=st.integers(1, 200),
    symmetric=st.booleans(),
    seed=st.integers(0, 99),
)
@examples(25, 100)
def test_inputs_without_correlation_round_to_nearest(
    rows: int, features: int, size: int, symmetric: bool, seed: int
) -> None:
    weight, int4 = drawn(rows, features, seed=seed), Int4Format(size, symmetric)
    diagonal = drawn(features, seed=seed + 1).square() * (drawn(features, seed=seed + 2) > -1)
    assert equal(gptq(weight, torch.diag(diagonal), int4), int4.quantize(weight))


@given(
    rows=st.integers(1, 9),
    features=st.integers(2, 200),
    tokens=st.integers(1, 40),
    size=st.integers(1, 150),
    symmetric=st.booleans(),
    seed=st.integers(0, 99),
)
@examples(25, 100)
def test_columns_of_inputs_that_are_always_0(
    rows: int, features: int, tokens: int, size: int, symmetric: bool, seed: int
) -> None:
    """Fewer tokens than features, and dead inputs: all is finite, and columns of dead inputs round to nearest."""
    weight, x = drawn(rows, features, seed=seed), drawn(tokens, features, seed=seed + 1)
    dead = drawn(features, seed=seed + 2) > 0.5
    x[:, dead] = 0
    found = gptq(weight, x.t() @ x, Int4Format(size, symmetric))
    assert found.shape == (rows, features)
    assert found.is_finite(torch.float32)
    scales = found.scales[:, found.groups]
    zeros = 8 if found.mins is None else (-found.mins / found.scales).round()[:, found.groups]
    nearest = ((weight / scales).round() + zeros).clamp(0, LEVELS)
    assert torch.equal(found.codes[:, dead].float(), nearest[:, dead])


def test_weights_of_0() -> None:
    x = correlated(50, 32)
    assert not gptq(torch.zeros(4, 32), x.t() @ x, Int4Format(16)).dense(torch.float32).any()
