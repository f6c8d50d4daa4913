"""The products of CPU kernels with weights of 8-bit codes, on every instruction set that this processor supports."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.cpu.cpu_ops import CpuOps
from kernels.cpu.library import CpuKernels
from kernels.cpu.packing import PackedCoded, can_pack, pack
from kernels.ops import Gate
from kernels.weights.matrix import QuantizedMatrix, regular_groups
from kernels.weights.weight_format import FORMATS
from tests.support.gates import GATES, joined
from tests.support.profiles import each_value

HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALVES]
FORMS = ["fp8", "int8"]


def matrix(
    form: str, rows: int, features: int, size: int, *, first: int = 0, shuffled: bool = False, seed: int = 0
) -> QuantizedMatrix:
    """Draw a matrix with groups of `size` features, of which `first` are missing in the first group."""
    generator = torch.Generator().manual_seed(seed)
    groups = regular_groups(features, size, first=first)
    if shuffled:
        groups = groups[torch.randperm(features, generator=generator)]
    codes = torch.randint(-128, 128, (rows, features), generator=generator, dtype=torch.int8)
    if form == "fp8":
        codes[(codes & 0x7F) == 0x7F] = 0  # NaN
        codes = codes.view(torch.float8_e4m3fn)
    scales = (torch.rand(rows, int(groups.max()) + 1, generator=generator) + 0.5) / 4096
    return QuantizedMatrix(format=form, codes=codes, scales=scales, mins=None, groups=groups, group_size=size)


def assert_product(y: Tensor, x: Tensor, weights: QuantizedMatrix, bias: Tensor | None = None) -> None:
    """Compare float32 results with the product in float64, up to the rounding of sums."""
    exact = weights.dense(torch.float64)
    expected, size = x.double() @ exact.T, x.double().abs() @ exact.abs().T
    if bias is not None:
        expected += bias
    error = (y.double() - expected).abs()
    assert (error <= 2e-6 * size + 1e-6 * expected.abs()).all(), (error / size).max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [2, 40], ids=["few", "many"])
@pytest.mark.parametrize("form", FORMS)
def test_all_codes(kernels: CpuKernels, form: str, rows: int, dtype: torch.dtype) -> None:
    """Each code is decoded exactly, wherever it stands; fp8's NaN makes its own output NaN and no other."""
    codes = torch.arange(256).to(torch.uint8).view(256, 1)
    codes = torch.stack([codes.roll(shift, 0)[:, 0] for shift in range(6)], 1)
    typed = codes.view(torch.float8_e4m3fn if form == "fp8" else torch.int8)
    weights = QuantizedMatrix(
        format=form,
        codes=typed,
        scales=torch.full((256, 3), 0.5),
        mins=None,
        groups=regular_groups(6, 2),
        group_size=2,
    )
    x = torch.eye(6).repeat(rows // 6 + 1, 1)[:rows].to(dtype)
    y = kernels.linear(x, pack(weights), float_out=True)
    values = weights.dense(torch.float32)
    pairs = values.view(256, 3, 2).isnan().any(2).any(1)
    for row in range(rows):
        expected = torch.where(pairs, torch.nan, values[:, row % 6])
        torch.testing.assert_close(y[row], expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("sizes", "form", "dtype"),
    each_value(
        [(576, 576), (577, 577), (64, 16), (352, 32), (300, 64), (520, 128), (448, 192), (30, 6), (35, 5), (3, 3)],
        FORMS,
        DTYPES,
    ),
    ids=str,
)
def test_products(kernels: CpuKernels, sizes: tuple[int, int], form: str, dtype: torch.dtype) -> None:
    """sizes: features, and features per group."""
    features, size = sizes
    torch.manual_seed(features)
    weights = matrix(form, 100, features, size)
    bias = torch.randn(100).to(dtype)
    packed = pack(weights, bias)
    for rows in (1, 3, 13):
        x = torch.randn(rows, features).to(dtype)
        y = kernels.linear(x, packed, float_out=True)
        assert_product(y, x, weights, bias)
        rounded = kernels.linear(x, packed)
        assert rounded.dtype == dtype
        assert torch.equal(rounded, y.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_groups_that_are_not_in_order(kernels: CpuKernels, form: str, dtype: torch.dtype) -> None:
    """Those of a checkpoint with permuted features, and those of a part that begins within a group."""
    torch.manual_seed(0)
    x = torch.randn(9, 200).to(dtype)
    for weights in (
        matrix(form, 40, 200, 32, shuffled=True),
        matrix(form, 40, 200, 32, first=20),
        matrix(form, 40, 240, 32).cut(slice(None), slice(24, 224)),
    ):
        assert_product(kernels.linear(x, pack(weights), float_out=True), x, weights)


@pytest.mark.parametrize(("size", "form", "dtype"), each_value([16, 32, 128, 200], FORMS, DTYPES), ids=str)
def test_a_row_depends_on_nothing_else(kernels: CpuKernels, form: str, size: int, dtype: torch.dtype) -> None:
    """Neither the number of rows, nor the place, nor the number of threads changes a result, to the bit."""
    torch.manual_seed(1)
    features = 400
    x = torch.randn(250, features + 1).to(dtype)[:, 1:]  # rows that begin within a word
    packed = pack(matrix(form, 90, features, size))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = torch.cat([kernels.linear(x[row : row + 1], packed, float_out=True) for row in range(len(x))])
        for count in (1, 2):
            torch.set_num_threads(count)
            for rows in (*range(1, 41), 250):
                for first in {0, 250 - rows}:
                    y = kernels.linear(x[first : first + rows], packed, float_out=True)
                    assert torch.equal(y, alone[first : first + rows]), (rows, first, count)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
@pytest.mark.parametrize("gated", [None, *GATES])
@pytest.mark.parametrize("rows", [1, 30])
@pytest.mark.parametrize("form", FORMS)
def test_linear_of_the_device(kernels: CpuKernels, form: str, rows: int, gated: Gate | None, wide: bool) -> None:
    torch.manual_seed(2)
    weights = matrix(form, 84, 96, 32)
    x, bias = torch.randn(rows, 96).bfloat16(), torch.randn(84).bfloat16()
    linear = CpuOps(kernels).linear(weights, bias, gated=gated, wide=wide)
    assert not linear.references_weights
    expected = x.float() @ weights.dense(torch.float32).T + bias
    if gated:
        expected = joined(gated, *expected.chunk(2, 1))
    y = linear(x)
    assert y.dtype == (torch.float32 if wide else torch.bfloat16)
    torch.testing.assert_close(y.float(), expected, rtol=1e-5 if wide else 2**-8, atol=1e-5)


def test_matrices_that_are_coded() -> None:
    grouped, one = matrix("int8", 8, 64, 32), FORMATS["int8"].quantize(torch.randn(8, 64))
    for coded in (grouped, matrix("fp8", 8, 64, 64)):
        assert isinstance(pack(coded), PackedCoded)
    for other in (one, FORMATS["int4"].quantize(torch.randn(8, 64)), FORMATS["dense"].quantize(torch.randn(8, 64))):
        assert not isinstance(pack(other), PackedCoded)
        assert can_pack(other)
    assert not can_pack(replace(grouped, mins=torch.zeros(8, 2)))


def test_memory_of_weights() -> None:
    """A byte per weight, and scales: one of float32 per group."""
    assert pack(matrix("int8", 64, 128, 32)).nbytes == 64 * 128 + 64 * 4 * 4
    assert pack(matrix("fp8", 64, 128, 128)).nbytes == 64 * 128 + 64 * 4


def test_what_does_not_fit_is_refused(kernels: CpuKernels) -> None:
    packed = PackedCoded(matrix("fp8", 32, 64, 64))
    with pytest.raises(RuntimeError, match="x has 48 features, the weights 64"):
        kernels.linear(torch.randn(2, 48), packed)
    packed.scales = packed.scales[:, :0]
    with pytest.raises(RuntimeError, match="linear_coded: groups"):
        kernels.linear(torch.randn(2, 64), packed)


def test_nothing_comes_of_nothing(kernels: CpuKernels) -> None:
    weights = matrix("int8", 5, 64, 32)
    assert kernels.linear(torch.randn(0, 64), pack(weights)).shape == (0, 5)
    assert kernels.linear(torch.randn(3, 64), pack(weights.cut(slice(0, 0), slice(None)))).shape == (3, 0)
