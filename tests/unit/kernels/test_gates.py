"""Gates in the products of the compiled CPU kernels, against plain torch."""

from __future__ import annotations

import pytest
import torch

from kernels.cpu.cpu_ops import CpuOps
from kernels.cpu.library import CpuKernels
from kernels.cpu.packing import PackedWeights, pack_gated
from kernels.ops import Gate
from kernels.weights.weight_format import FORMATS
from tests.support.gates import GATES, joined


@pytest.mark.parametrize("function", GATES)
def test_gated_linear(kernels: CpuKernels, function: Gate) -> None:
    torch.manual_seed(0)
    x, gate, value = torch.randn(7, 64), torch.randn(48, 64) / 2, torch.randn(48, 64) / 2  # many beyond 7
    y = kernels.linear(x, PackedWeights(pack_gated(torch.cat([gate, value])), columns=len(gate)), gate=function)
    torch.testing.assert_close(y, joined(function, x @ gate.T, x @ value.T), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("function", GATES)
def test_gates_of_any_size(kernels: CpuKernels, function: Gate) -> None:
    """From those that are closed, over those where the function bends, to those whose powers no float32 holds."""
    exponents = torch.linspace(-20, 18, 400, dtype=torch.float64)
    sizes = torch.cat([10**exponents, torch.linspace(0, 12, 400, dtype=torch.float64)]).float()
    gates = torch.cat([sizes, -sizes, torch.tensor([float("nan")])])[:, None]
    gate_and_one = torch.cat([gates, torch.ones_like(gates)], 1)
    weights = PackedWeights(pack_gated(torch.eye(2)), columns=1)
    y = kernels.linear(gate_and_one, weights, gate=function)
    expected = joined(function, gates.double(), torch.ones_like(gates).double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("function", GATES)
def test_values_of_any_size(kernels: CpuKernels, function: Gate) -> None:
    sizes = torch.cat([torch.linspace(0, 12, 400), 10 ** torch.linspace(-20, 30, 400)])
    values = torch.cat([sizes, -sizes, torch.tensor([float("nan")])])[:, None]
    for gate in (0.75, 9.0):
        gates = torch.full_like(values, gate)
        weights = PackedWeights(pack_gated(torch.eye(2)), columns=1)
        y = kernels.linear(torch.cat([gates, values], 1), weights, gate=function)
        expected = joined(function, gates.double(), values.double())
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("function", GATES)
def test_gates_of_every_format(kernels: CpuKernels, function: Gate, name: str, bias: bool) -> None:
    """Products are joined as those are that have no gate."""
    torch.manual_seed(0)
    x, added = torch.randn(33, 96).bfloat16(), torch.randn(84).bfloat16() if bias else None
    matrix = FORMATS[name].quantize((torch.randn(84, 96) / 2).to(torch.bfloat16 if name == "dense" else torch.float32))
    ops = CpuOps(kernels)
    gate, value = ops.linear(matrix, added, wide=True)(x).chunk(2, 1)
    assert gate.max() > 7
    assert value.abs().max() > 7
    y = ops.linear(matrix, added, gated=function, wide=True)(x)
    torch.testing.assert_close(y, joined(function, gate, value), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("function", GATES)
def test_gates_of_a_row_depend_on_nothing_else(kernels: CpuKernels, function: Gate) -> None:
    torch.manual_seed(0)
    columns, features = 42, 192
    weight = torch.randn(2 * columns, features) * features**-0.5
    x = torch.randn(130, features).bfloat16()
    ops = CpuOps(kernels)
    for matrix in (
        *(FORMATS[name].quantize(weight) for name in ("int8", "int4", "fp8")),
        FORMATS["dense"].quantize(weight.bfloat16()),
    ):
        linear = ops.linear(matrix, None, gated=function, wide=True)
        whole = linear(x)
        for first, last in ((0, 1), (3, 8), (10, 40), (129, 130)):
            assert torch.equal(linear(x[first:last]), whole[first:last]), (matrix.format, first, last)
