"""Formats of weights: what rounding keeps, and that parts of a matrix are parts of the same numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.weights.fp8_weights import Fp8Format
from kernels.weights.int4_weights import Int4Format
from kernels.weights.int8_weights import Int8Format
from kernels.weights.matrix import DenseMatrix, Matrix, QuantizedMatrix, grouped_order, join, regular_groups
from kernels.weights.weight_format import FORMATS, WeightFormat, convert

CODED: list[WeightFormat] = [
    Int8Format(),
    Fp8Format(),
    *(Int4Format(size, symmetric) for size in (32, 64, 128) for symmetric in (False, True)),
    *(Int4Format(size, minima=True) for size in (32, 64, 128)),
]


def named(form: WeightFormat) -> str:
    if not isinstance(form, Int4Format):
        return form.name
    zeros = "symmetric" if form.symmetric else "minima" if form.minima else "zero points"
    return f"int4, {form.group_size}, {zeros}"


def weight(rows: int, features: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, features, generator=torch.Generator().manual_seed(seed)) * 0.02


def quantize(form: WeightFormat, values: torch.Tensor) -> QuantizedMatrix:
    matrix = form.quantize(values)
    assert isinstance(matrix, QuantizedMatrix)
    return matrix


def assert_equal(one: QuantizedMatrix, other: QuantizedMatrix) -> None:
    """Of groups that hold no feature, nothing is compared."""
    assert (one.format, one.group_size, one.zero) == (other.format, other.group_size, other.zero)
    assert torch.equal(one.codes.float(), other.codes.float())
    assert torch.equal(one.scales[:, one.groups], other.scales[:, other.groups])
    assert torch.equal(one.dense(torch.float64), other.dense(torch.float64))


@pytest.mark.parametrize("form", CODED, ids=named)
@pytest.mark.parametrize("features", [1, 31, 64, 200])
def test_each_weight_is_rounded_to_the_nearest_code(form: WeightFormat, features: int) -> None:
    values = weight(7, features)
    matrix = quantize(form, values)
    error, step = (matrix.dense(torch.float32) - values).abs(), matrix.scales[:, matrix.groups]
    if isinstance(form, Fp8Format):  # half a unit of three bits of mantissa, or of the smallest denormal number
        step = torch.maximum(values.abs() / 2**4, step * 2**-10) * 2
    elif isinstance(form, Int4Format):  # the scale itself is rounded, and the zero point; a large weight may be clipped
        step = step * (1.01 if form.symmetric else 2.01)
    held = 0.0 if matrix.mins is None else matrix.mins[:, matrix.groups].abs() * 2**-11  # in float16
    assert (error <= step / 2 * 1.001 + 1e-12 + held).all()


def test_what_int4_holds_exactly() -> None:
    """Zero is a code, and so are weights that lie on a grid of sixteen; with minima, wherever it begins."""
    grid = torch.arange(-5, 11).float().repeat(2, 4) * 0.0078125
    for size in (32, 64):
        assert torch.equal(quantize(Int4Format(size), grid).dense(torch.float32), grid)
        assert torch.equal(quantize(Int4Format(size, minima=True), grid + 0.40625).dense(torch.float32), grid + 0.40625)
    zeros = torch.zeros(3, 70)
    for form in CODED:
        assert torch.equal(quantize(form, zeros).dense(torch.float32), zeros)


def test_scales_that_float16_cannot_hold() -> None:
    for size in (1e-9, 1e6):
        values = weight(4, 64) * size
        for form in (Int4Format(64), Int4Format(64, symmetric=True), Int4Format(64, minima=True)):
            error = (quantize(form, values).dense(torch.float32) - values).norm() / values.norm()
            assert error < 0.15


@given(
    rows=st.integers(1, 9),
    features=st.integers(1, 300),
    cuts=st.lists(st.integers(0, 300), min_size=2, max_size=2),
    form=st.sampled_from(CODED),
)
def test_parts_of_a_rounded_matrix_are_rounded_parts(
    rows: int, features: int, cuts: list[int], form: WeightFormat
) -> None:
    """A rank that reads `spanned` rounds to the numbers that the whole matrix is rounded to."""
    start, stop = sorted(min(cut, features) for cut in cuts)
    if start == stop:
        return
    values, some = weight(rows, features), slice(rows // 3, rows)
    whole = quantize(form, values).cut(some, slice(start, stop))
    span = form.spanned(slice(start, stop), features)
    assert 0 <= span.start <= start < stop <= span.stop <= features
    part = quantize(form, values[some, span]).cut(slice(None), slice(start - span.start, stop - span.start))
    assert_equal(part, whole)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=60), st.sampled_from([8, 16, 32]))
def test_the_order_of_permuted_groups(chosen: list[int], size: int) -> None:
    kept, groups = torch.unique(torch.tensor(chosen), return_inverse=True)
    if int(torch.bincount(groups).max()) > size:
        return
    order = grouped_order(groups, size)
    if order is None:
        assert torch.equal(groups, regular_groups(len(groups), size))
        return
    assert len(order) == len(kept) * size
    places = order[order >= 0]
    assert torch.equal(places.sort().values, torch.arange(len(groups)))
    for group, part in enumerate(order.view(-1, size)):
        assert (groups[part[part >= 0]] == group).all()


def test_matrices_with_the_same_groups_join() -> None:
    form = Int4Format(32)
    parts = [quantize(form, weight(rows, 70, rows)) for rows in (3, 5)]
    whole = join(parts)
    assert whole is not None
    assert torch.equal(whole.dense(torch.float32), torch.cat([part.dense(torch.float32) for part in parts]))
    others: list[Matrix] = [
        quantize(Int4Format(64), weight(5, 70)),
        quantize(Int4Format(32, symmetric=True), weight(5, 70)),
        quantize(Int8Format(), weight(5, 70)),
        DenseMatrix(weight(5, 70)),
        replace(parts[1], groups=parts[1].groups.flip(0)),
    ]
    assert [join([parts[0], other]) for other in others] == [None] * len(others)


@pytest.mark.parametrize("name", FORMATS)
def test_conversions(name: str) -> None:
    values = weight(6, 100).bfloat16()
    sources: list[Matrix] = [DenseMatrix(values), Int4Format(32).quantize(values), Int8Format().quantize(values)]
    for stored in sources:
        found = convert(stored, name, torch.bfloat16)
        assert found.format == name
        if stored.format == name != "dense":
            assert found is stored  # whatever its groups are
        assert (found.dense(torch.float32) - values.float()).norm() / values.float().norm() < 0.15


@pytest.mark.parametrize("form", [*CODED, FORMATS["dense"]], ids=named)
def test_infinite_weights_are_seen(form: WeightFormat) -> None:
    values = weight(3, 64)
    assert form.quantize(values).is_finite(torch.bfloat16)
    values[1, 5] = float("nan")
    assert not form.quantize(values).is_finite(torch.bfloat16)
