"""Products with weights of 4 bits, of every instruction set that this processor supports, against the products with the
matrices' values."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from torch import Tensor

from kernels.cpu.cpu_ops import CpuOps
from kernels.cpu.library import CpuKernels
from kernels.cpu.packing import PackedInt4, pack
from kernels.weights.int4_weights import Int4Format
from kernels.weights.matrix import QuantizedMatrix, regular_groups
from tests.support.gates import GATES, joined
from tests.support.profiles import each_value, examples

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ZEROS = {"eight": None, "points": torch.uint8, "halves": torch.float16, "floats": torch.float32}
"""What each kind of zeros is kept as."""


def random_matrix(columns: int, features: int, size: int, zeros: str, *, halves: bool = True) -> QuantizedMatrix:
    """Make a matrix with groups of `size` features. zeros: key of ZEROS. halves: scales are numbers of float16."""
    groups = -(-features // size)
    scales = torch.rand(columns, groups) * 0.02 + 0.001
    if halves:
        scales = scales.half().float()
    mins = {
        "eight": None,
        "points": -torch.randint(16, scales.shape) * scales,
        "halves": -(torch.rand(scales.shape) / 8).half().float(),
        "floats": -torch.rand(scales.shape) / 8,
    }[zeros]
    return QuantizedMatrix(
        format="int4",
        codes=torch.randint(16, (columns, features), dtype=torch.uint8),
        scales=scales,
        mins=mins,
        groups=regular_groups(features, size),
        group_size=size,
    )


def permuted(matrix: QuantizedMatrix) -> QuantizedMatrix:
    """Assign features to groups in random order, as checkpoints with activation order do."""
    return replace(matrix, groups=matrix.groups[torch.randperm(matrix.shape[1])])


def packed_int4(matrix: QuantizedMatrix, bias: Tensor | None = None, *, gated: bool = False) -> PackedInt4:
    packed = pack(matrix, bias, gated=gated)
    assert isinstance(packed, PackedInt4)
    return packed


def largest_error(x: Tensor, matrix: QuantizedMatrix) -> Tensor:
    """Bound the errors of products, [rows, columns]: inputs are off by half a scale, and sums are rounded."""
    wide, dense, groups = x.double().abs(), matrix.dense(torch.float64).abs(), matrix.scales.shape[1]
    peaks = torch.stack([wide[:, matrix.groups == group].amax(1) for group in range(groups)], 1)
    scales = (peaks / 127)[:, matrix.groups]
    parts = (matrix.codes + matrix.zero) * matrix.scales.abs().double()[:, matrix.groups]
    if matrix.mins is not None:
        parts += matrix.mins.abs()[:, matrix.groups]
    return (scales * 0.5001) @ dense.T + (groups + 4) * 2**-24 * (wide + scales) @ parts.T


def check(kernels: CpuKernels, x: Tensor, matrix: QuantizedMatrix) -> Tensor:
    """Check a product, and that each row has the same bits alone."""
    packed = packed_int4(matrix)
    y = kernels.linear(x, packed, float_out=True)
    expected = x.double() @ matrix.dense(torch.float64).T
    assert ((y - expected).abs() <= largest_error(x, matrix)).all()
    for row in range(len(x)):
        assert torch.equal(kernels.linear(x[row : row + 1], packed, float_out=True)[0], y[row])
    return y


@given(
    dtype=st.sampled_from(DTYPES),
    size=st.sampled_from([16, 24, 32, 64, 128, 577, 1000]),
    zeros=st.sampled_from(sorted(ZEROS)),
    halves=st.booleans(),
    act_order=st.booleans(),
    rows=st.integers(1, 40),
    features=st.sampled_from([16, 64, 120, 256, 577]),
    columns=st.sampled_from([1, 16, 31, 32, 100]),
    seed=st.integers(0, 1000),
)
@examples(40, 200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_products(
    kernels: CpuKernels,
    dtype: torch.dtype,
    size: int,
    zeros: str,
    halves: bool,
    act_order: bool,
    rows: int,
    features: int,
    columns: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    matrix = random_matrix(columns, features, size, zeros, halves=halves)
    if act_order:
        matrix = permuted(matrix)
    check(kernels, torch.randn(rows, features).to(dtype), matrix)


@pytest.mark.parametrize(("zeros", "size"), each_value([*ZEROS], [32, 64, 128, 256]))
def test_a_row_depends_on_nothing_else(kernels: CpuKernels, zeros: str, size: int) -> None:
    """Neither the number of rows, nor its place, nor the number of threads changes a bit."""
    torch.manual_seed(size)
    x, packed = torch.randn(300, 256).bfloat16(), packed_int4(random_matrix(100, 256, size, zeros))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = kernels.linear(x, packed, float_out=True)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert torch.equal(kernels.linear(x, packed, float_out=True), whole)
            for rows in range(1, 41):
                first = rows * 7 % 260
                part = kernels.linear(x[first : first + rows], packed, float_out=True)
                assert torch.equal(part, whole[first : first + rows])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [16, 96, 100])
@pytest.mark.parametrize("symmetric", [False, True])
def test_epilogues(kernels: CpuKernels, dtype: torch.dtype, columns: int, symmetric: bool) -> None:
    """Bias, gates, and results in float32."""
    torch.manual_seed(columns)
    x, bias = torch.randn(7, 200).to(dtype), torch.randn(columns)
    matrix = Int4Format(64, symmetric).quantize(torch.randn(columns, 200) / 14)
    plain = kernels.linear(x, packed_int4(matrix), float_out=True)
    assert torch.equal(kernels.linear(x, packed_int4(matrix, bias), float_out=True), plain + bias)
    ops = CpuOps(kernels)
    assert torch.equal(ops.linear(matrix, bias, wide=True)(x), plain + bias)
    assert torch.equal(ops.linear(matrix, bias)(x), (plain + bias).to(dtype))
    gate, value = (plain + bias).chunk(2, 1)
    for how in GATES:
        gated = ops.linear(matrix, bias, gated=how, wide=True)(x)
        torch.testing.assert_close(gated, joined(how, gate, value), rtol=1e-5, atol=1e-6)


def test_what_is_packed() -> None:
    """Numbers that float16 holds take half the memory, and minima that are codes times scales a quarter."""
    for zeros, kept in ZEROS.items():
        packed = packed_int4(random_matrix(64, 256, 64, zeros))
        assert packed.scales.dtype == torch.float16
        assert (packed.zeros is None) if kept is None else (packed.zeros is not None and packed.zeros.dtype == kept)
        assert packed.order is None
    assert packed_int4(random_matrix(64, 256, 64, "eight", halves=False)).scales.dtype == torch.float32
    symmetric, plain = (packed_int4(Int4Format(64, each).quantize(torch.randn(64, 256))) for each in (True, False))
    assert symmetric.nbytes == 64 * 256 // 2 + 64 * 4 * 2
    assert plain.nbytes == symmetric.nbytes + 64 * 4
    assert packed_int4(permuted(random_matrix(64, 256, 64, "eight"))).order is not None


def test_scales_of_zero(kernels: CpuKernels) -> None:
    """A group without weights, as files have it: no scale, and no minimum."""
    matrix = random_matrix(40, 128, 32, "points")
    assert matrix.mins is not None
    matrix.scales[3, 1] = matrix.mins[3, 1] = 0
    matrix.scales[5] = matrix.mins[5] = 0
    assert packed_int4(matrix).zeros is not None
    y = check(kernels, torch.randn(3, 128), matrix)
    assert (y[:, 5] == 0).all()
    matrix.mins[5] = -0.1  # a constant
    check(kernels, torch.randn(3, 128), matrix)


@pytest.mark.parametrize("zeros", ZEROS)
def test_inputs_at_the_limits(kernels: CpuKernels, zeros: str) -> None:
    torch.manual_seed(0)
    matrix = random_matrix(40, 256, 64, zeros)
    x = torch.randn(6, 256)
    x[1] = 0
    x[2, 64:128] = 0
    x[3, 70] = 1e30  # coarse in its group only
    x[4] *= 1e-42  # too small to have a scale
    x[5, :128] = torch.tensor([1.0, -1.0]).repeat(64)
    y = check(kernels, x[[0, 1, 2, 3, 5]], matrix)
    assert (y[1] == 0).all()
    assert (kernels.linear(x[4:5], packed_int4(matrix), float_out=True).abs() < 1e-36).all()


@pytest.mark.parametrize("zeros", ZEROS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_shows(kernels: CpuKernels, zeros: str, bad: float) -> None:
    matrix, x = random_matrix(40, 256, 64, zeros), torch.randn(3, 256)
    expected = kernels.linear(x, packed_int4(matrix), float_out=True)
    x[1, 100] = bad
    y = kernels.linear(x, packed_int4(matrix), float_out=True)
    assert y[1].isnan().all()
    assert torch.equal(y[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("zeros", ["eight", "points"])
def test_sums_are_exact(kernels: CpuKernels, zeros: str) -> None:
    """The largest sums of one group: they fit neither 16 bits nor, with what zeros add, 24."""
    features = 32768
    matrix = random_matrix(4, features, features, zeros)
    matrix.codes[:] = 15
    matrix.scales[:] = 1
    if matrix.mins is not None:
        matrix.mins[:] = -8
    x = torch.full((2, features), 127.0)
    x[1, ::2] = -127
    assert kernels.linear(x, packed_int4(matrix), float_out=True).tolist() == [[127.0 * 7 * features] * 4, [0.0] * 4]


def test_rows_apart(kernels: CpuKernels) -> None:
    """Rows that are part of wider ones, and begin anywhere."""
    torch.manual_seed(0)
    wide = torch.randn(5, 131).bfloat16()
    for matrix in (random_matrix(40, 128, 32, "eight"), permuted(random_matrix(40, 128, 32, "eight"))):
        packed = packed_int4(matrix)
        assert torch.equal(kernels.linear(wide[:, 1:129], packed), kernels.linear(wide[:, 1:129].contiguous(), packed))


def test_cuts_of_a_matrix(kernels: CpuKernels) -> None:
    """A part of the features that begins within a group."""
    torch.manual_seed(0)
    matrix = random_matrix(40, 256, 64, "points").cut(slice(8, 40), slice(32, 208))
    check(kernels, torch.randn(5, 176), matrix)


def test_what_does_not_fit_is_refused(kernels: CpuKernels) -> None:
    with pytest.raises(RuntimeError, match="x has 48 features, the weights 64"):
        kernels.linear(torch.randn(2, 48), packed_int4(random_matrix(32, 64, 32, "eight")))
    assert kernels.linear(torch.randn(0, 64), packed_int4(random_matrix(5, 64, 32, "eight"))).shape == (0, 5)
