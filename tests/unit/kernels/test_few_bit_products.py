"""Products of few-bit weights on GPU kernels against plain torch; test_gpu_kernels.py describes where these run."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels.ops import Gate
from kernels.reference_ops import QuantizedLinear, reference_linear
from kernels.weights.fp8_weights import LARGEST
from kernels.weights.int4_weights import Int4Format
from kernels.weights.matrix import TINY, DenseMatrix, QuantizedMatrix, regular_groups
from kernels.weights.weight_format import FORMATS
from tests.support.gates import GATES
from tests.support.profiles import each_value, examples, is_all, only_in_all

pytest.importorskip("triton", reason="Triton is not installed: there are no builds for this platform")

from kernels.gpu import INTERPRETED
from kernels.gpu.gpu_ops import GpuOps
from kernels.gpu.products import few_bit_products, few_bit_sums
from kernels.gpu.products.few_bit_layout import COLUMNS, LINE, lay_out
from kernels.gpu.products.few_bit_products import few_bit_product, product_shape
from kernels.gpu.products.fp8_products import Fp8Linear, multiplies_fp8, round_inputs

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") else "cuda")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.7e-2, torch.float16: 2e-3}


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(DEVICE, dtype)


def rounded(format: str, weight: Tensor) -> QuantizedMatrix:
    matrix = FORMATS[format].quantize(weight)
    assert isinstance(matrix, QuantizedMatrix)
    return matrix


def codes_of(format: str, columns: int, features: int) -> Tensor:
    if format == "int4":
        return torch.randint(0, 16, (columns, features), dtype=torch.uint8)
    if format == "int8":
        return torch.randint(-128, 128, (columns, features), dtype=torch.int8)
    return torch.randn(columns, features).to(torch.float8_e4m3fn)


def draw(format: str, columns: int, features: int, size: int, mins: str, permuted: bool) -> QuantizedMatrix:
    """Draw a matrix. mins: none, zeros (whole multiples of scales) or any."""
    groups = regular_groups(features, size)
    count = int(groups[-1]) + 1
    if permuted:
        groups = groups[torch.randperm(features)]
    scales = torch.rand(columns, count).add(0.5).half().float()
    offsets = {"zeros": -torch.randint(0, 17, (columns, count)) * scales, "any": torch.randn(columns, count)}
    matrix = QuantizedMatrix(
        format=format,
        codes=codes_of(format, columns, features),
        scales=scales,
        mins=offsets.get(mins),
        groups=groups,
        group_size=size,
    )
    return matrix.to(DEVICE)


def check(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> None:
    """Compare sums of many numbers, whose rounding is that of the largest of them."""
    tolerance = TOLERANCE[dtype]
    scale = float(theirs.float().abs().max())
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=tolerance, atol=tolerance * scale)


@given(
    format=st.sampled_from(["int4", "int8", "fp8"]),
    rows=st.sampled_from([1, 5, 17, 70]),
    columns=st.sampled_from([3, 130]),
    features=st.sampled_from([7, 64, 150, 390]),
    size=st.sampled_from([16, 20, 32, 48, 64, 128, 1000]),
    mins=st.sampled_from(["none", "zeros", "any"]),
    permuted=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    wide=st.booleans(),
    seed=st.integers(0, 1000),
)
@examples(7, 120)
def test_products(
    format: str,
    rows: int,
    columns: int,
    features: int,
    size: int,
    mins: str,
    permuted: bool,
    dtype: torch.dtype,
    bias: bool,
    wide: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    matrix = draw(format, columns, features, min(size, features), mins, permuted)
    x = randn(rows, features + 3, dtype=dtype)[:, :features]  # rows are not contiguous
    added = randn(columns, dtype=dtype) if bias else None
    expected = QuantizedLinear(matrix, added, gated=None, wide=wide)(x)
    ours = few_bit_product(x, lay_out(matrix), added, wide=wide)
    assert ours.dtype == expected.dtype
    check(ours, expected, torch.float32 if wide else dtype)
    assert few_bit_product(x[:0], lay_out(matrix), added).shape == (0, columns)


@pytest.mark.parametrize(("format", "dtype"), each_value(["int4", "int8", "fp8"], DTYPES), ids=str)
def test_every_code(format: str, dtype: torch.dtype) -> None:
    """Each code in each place of a word has its exact value; fp8 has subnormal numbers."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[:16] if format == "int4" else codes.view(torch.int8 if format == "int8" else torch.float8_e4m3fn)
    codes = codes[codes.float().isfinite()]
    features = 4 * LINE
    matrix = QuantizedMatrix(
        format=format,
        codes=codes[:, None].expand(-1, features),
        scales=torch.ones(len(codes), 1),
        mins=None,
        groups=regular_groups(features, features),
        group_size=features,
    ).to(DEVICE)
    places = torch.eye(features)[::LINE].to(DEVICE, dtype)  # one feature of each place
    product = few_bit_product(places, lay_out(matrix), None, wide=True)
    assert torch.equal(product.cpu(), (codes.float() - matrix.zero).expand(len(places), -1))


@pytest.mark.parametrize("format", ["int4", only_in_all("int8"), "fp8"])
def test_splits_are_added_in_order(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With any number of them a row has the same sums, apart from rounding, and the same ones each time."""
    torch.manual_seed(0)
    matrix, x = draw(format, 40, 800, 64, "none", False), randn(2, 800, dtype=torch.bfloat16)
    bias = randn(40, dtype=torch.bfloat16)
    expected = QuantizedLinear(matrix, bias, gated=None, wide=True)(x)
    weights = lay_out(matrix)
    for splits in (1, 2, 5, 100) if is_all() else (2, 100):
        shape = product_shape(2, weights, x.dtype)._replace(splits=splits)
        monkeypatch.setattr(few_bit_products, "product_shape", lambda *_, shape=shape: shape)
        ours = few_bit_product(x, weights, bias, wide=True)
        check(ours, expected, torch.float32)
        assert torch.equal(few_bit_product(x, weights, bias, wide=True), ours)


def test_shapes() -> None:
    """Few rows are split while programs are too few for the device; many rows have larger tiles and no splits."""
    matrix = QuantizedMatrix(
        format="int4",
        codes=torch.zeros(256, 4096, dtype=torch.uint8),
        scales=torch.ones(256, 64),
        mins=None,
        groups=regular_groups(4096, 64),
        group_size=64,
    )
    weights = lay_out(matrix)
    by_rows = {rows: product_shape(rows, weights, torch.bfloat16) for rows in (1, 16, 17, 64, 65, 512)}
    assert [shape.rows for shape in by_rows.values()] == [16, 16, 32, 64, 64, 64]
    assert [shape.splits for shape in by_rows.values()] == [8, 8, 7, 2, 1, 1]
    assert all(shape.columns == COLUMNS for shape in by_rows.values())
    one_group = lay_out(rounded("int8", torch.randn(256, 4096)))
    assert product_shape(65, one_group, torch.bfloat16).rows == 128


def test_what_a_matrix_takes_in_memory() -> None:
    """4 bits per weight, and 4 bytes per group, or 8 with any mins; no second copy for many rows."""
    matrix = Int4Format(64).quantize(torch.randn(256, 1024))
    assert lay_out(matrix).nbytes == 256 * (1024 // 2 + 16 * 4)
    assert lay_out(Int4Format(128, symmetric=True).quantize(torch.randn(256, 1024))).nbytes == 256 * (512 + 8 * 4)
    assert lay_out(rounded("int8", torch.randn(256, 1024))).nbytes == 256 * (1024 + 4)
    fractional = dataclasses.replace(matrix, mins=torch.randn(256, 16))
    assert lay_out(fractional).nbytes == 256 * (1024 // 2 + 16 * 8)
    assert lay_out(matrix).has_zeros
    assert not lay_out(fractional).has_zeros


@pytest.mark.parametrize(("format", "dtype", "gated"), each_value([*FORMATS], DTYPES, [*GATES, None]), ids=str)
def test_linear_of_every_format(format: str, dtype: torch.dtype, gated: Gate | None) -> None:
    """Results are those of the reference; of 8-bit integers, those without rounding of inputs."""
    torch.manual_seed(0)
    assert GpuOps.weight_formats == set(FORMATS)
    matrix = FORMATS[format].quantize(randn(48, 72) / 8)
    if isinstance(matrix, DenseMatrix):
        matrix = DenseMatrix(matrix.weight.to(dtype))
    x, bias = randn(3, 72, dtype=dtype), randn(48, dtype=dtype)
    make: Callable[..., QuantizedLinear] = reference_linear if format == "dense" else QuantizedLinear  # type: ignore[assignment]
    for wide in (False, True) if not gated else (False,):
        linear = GpuOps().linear(matrix, bias, gated=gated, wide=wide)
        ours, expected = linear(x), make(matrix, bias, gated, wide)(x)
        assert ours.dtype == expected.dtype
        check(ours, expected, dtype)
        assert linear.references_weights == (format == "dense")


def test_inputs_are_rounded_to_fp8_as_torch_does() -> None:
    torch.manual_seed(0)
    x = randn(7, 300) * 10.0 ** torch.linspace(-6, 6, 300, device=DEVICE)
    x[2] = 0
    for dtype in DTYPES:
        codes, scales = round_inputs(x.clamp(-6e4, 6e4).to(dtype)[:, :299])
        wide = x.clamp(-6e4, 6e4).to(dtype)[:, :299].float()
        torch.testing.assert_close(scales, (wide.abs().amax(1, keepdim=True) / LARGEST).clamp(min=TINY))
        expected = (wide / scales).to(torch.float8_e4m3fn)
        assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("format", "wrong"), each_value(["int4", "int8", "fp8"], [float("nan"), float("inf")]))
def test_what_is_not_a_number_stays_in_its_row(format: str, wrong: float) -> None:
    torch.manual_seed(0)
    matrix = draw(format, 16, 128, 32 if format == "int4" else 128, "none", False)
    for ops in (GpuOps(), GpuOps(multiplies_fp8=True)):
        x = randn(3, 128, dtype=torch.bfloat16)
        linear = ops.linear(matrix, None)
        expected = linear(x)
        x[1, 70] = wrong
        found = linear(x)
        assert not found[1].isfinite().any()
        assert torch.equal(found[[0, 2]], expected[[0, 2]])


def test_fp8_products_where_the_device_has_them() -> None:
    """torch has the same function for CPUs. Rounding inputs to 3 bits of significand adds 2.5 % to results."""
    torch.manual_seed(0)
    ops = GpuOps(multiplies_fp8=True)
    matrix = rounded("fp8", randn(64, 256))
    for bias in (None, randn(64, dtype=torch.bfloat16)):
        for rows in (1, 40):
            x = randn(rows, 256, dtype=torch.bfloat16)
            exact = QuantizedLinear(matrix, bias, gated=None, wide=True)(x)
            found = ops.linear(matrix, bias, wide=True)(x)
            assert found.dtype == torch.float32
            assert (found - exact).norm() < 0.04 * exact.norm()
            codes, scales = round_inputs(x)
            approximate = (codes.float() * scales) @ matrix.dense(torch.float32).t()
            check(found, approximate if bias is None else approximate + bias, torch.bfloat16)
    assert ops.linear(matrix, None)(x[:0]).shape == (0, 64)
    assert ops.linear(matrix, None).nbytes == 64 * 256 + 64 * 4
    assert isinstance(ops.linear(matrix, None).product, Fp8Linear)


def test_who_multiplies_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = rounded("fp8", torch.randn(64, 256))
    assert Fp8Linear.takes(matrix)
    assert not Fp8Linear.takes(matrix.cut(slice(0, 63), slice(0, 256)))
    assert not Fp8Linear.takes(matrix.cut(slice(0, 64), slice(0, 250)))
    assert not Fp8Linear.takes(draw("fp8", 64, 256, 128, "none", False))
    assert not Fp8Linear.takes(rounded("int8", torch.randn(64, 256)))
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, expected in (((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert multiplies_fp8(cuda, torch.bfloat16) == expected
        assert not multiplies_fp8(cuda, torch.float16)
        assert not multiplies_fp8(torch.device("cpu"), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("format", ["int4", "int8", "fp8"])
def test_instructions_do_what_their_twin_in_triton_does(
    format: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter has none. They handle two words in one register, whose bits must not get into one another."""
    if not INTERPRETED:
        pytest.skip("tested with the interpreter's own arguments")
    asked: set[tuple[int, int, int]] = set()
    bits = few_bit_sums._bits.fn

    def noted(words: Any, shift: int, mask: int, base: int, widen: bool) -> Any:
        asked.add((int(shift), int(mask), int(base)))
        return bits(words, shift, mask, base, widen)

    monkeypatch.setattr(few_bit_sums, "_bits", noted)
    few_bit_product(randn(1, 128, dtype=dtype), lay_out(draw(format, 16, 128, 128, "none", False)), None)
    assert len(asked) == {"int4": 4, "int8": 4, "fp8": 4}[format]
    words = torch.randint(-(2**15), 2**15, (5000, 2))
    for shift, mask, base in asked:
        text = few_bit_sums._assembly(shift, mask, base)
        found = re.fullmatch(
            r"\{ \.reg \.b32 t; (sh[rl])\.b32 t, \$1, (\d+); lop3\.b32 \$0, t, (0x\w+), (0x\w+), 0xEA; \}", text
        )
        assert found, text
        register = (words[:, 0] & 0xFFFF) | (words[:, 1] & 0xFFFF) << 16
        shifted = register >> int(found[2]) if found[1] == "shr" else register << int(found[2])
        result = shifted & int(found[3], 16) | int(found[4], 16)
        for half, word in enumerate(words.unbind(1)):
            word = word & 0xFFFF
            expected = ((word >> shift if shift >= 0 else word << -shift) & mask & 0xFFFF) | base
            assert torch.equal(result >> 16 * half & 0xFFFF, expected), text


@pytest.mark.skipif(not INTERPRETED, reason="tests/gpu captures graphs")
def test_products_are_captured() -> None:
    """Nothing asks the device a question: neither products in several splits with features in another order, nor those
    that round inputs to fp8."""
    from tests.support.recorded import Recorded

    torch.manual_seed(0)
    matrix = draw("int4", 40, 1200, 64, "zeros", True)
    few = GpuOps().linear(matrix, None)
    scaled = GpuOps(multiplies_fp8=True).linear(rounded("fp8", randn(64, 1200)), None)
    x, held = randn(2, 1200, dtype=torch.bfloat16), {}
    assert product_shape(2, lay_out(matrix), x.dtype).splits > 1

    def work() -> None:
        held["few"], held["scaled"] = few(x), scaled(x)

    replay = Recorded().capture(work)
    x.copy_(randn(2, 1200))
    replay()
    assert torch.equal(held["few"], few(x))
    assert torch.equal(held["scaled"], scaled(x))
