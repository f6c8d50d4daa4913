"""Gates in the products of the compiled CPU kernels, against plain torch."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from kernels.cpu.cpu_ops import CpuOps
from kernels.cpu.library import CpuKernels
from kernels.cpu.packing import PackedWeights, pack_gated
from kernels.ops import Gate
from kernels.weights.weight_format import FORMATS

GATES: tuple[Gate, ...] = get_args(Gate)


def gated(function: Gate, gate: Tensor) -> Tensor:
    functional = torch.nn.functional
    return functional.silu(gate) if function == "silu" else functional.gelu(gate, approximate="tanh")


@pytest.mark.parametrize("function", GATES)
def test_gated_linear(kernels: CpuKernels, function: Gate) -> None:
    torch.manual_seed(0)
    x, gate, value = torch.randn(7, 64), torch.randn(48, 64) / 8, torch.randn(48, 64) / 8
    y = kernels.linear(x, PackedWeights(pack_gated(torch.cat([gate, value])), columns=len(gate)), gate=function)
    torch.testing.assert_close(y, gated(function, x @ gate.T) * (x @ value.T), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("function", GATES)
def test_gates_of_any_size(kernels: CpuKernels, function: Gate) -> None:
    """From those that are closed, over those where the function bends, to those whose powers no float32 holds."""
    exponents = torch.linspace(-20, 18, 400, dtype=torch.float64)
    sizes = torch.cat([10**exponents, torch.linspace(0, 12, 400, dtype=torch.float64)]).float()
    gates = torch.cat([sizes, -sizes, torch.tensor([float("nan")])])[:, None]
    gate_and_one = torch.cat([gates, torch.ones_like(gates)], 1)
    weights = PackedWeights(pack_gated(torch.eye(2)), columns=1)
    y = kernels.linear(gate_and_one, weights, gate=function)
    torch.testing.assert_close(y.double(), gated(function, gates.double()), rtol=1e-5, atol=1e-12, equal_nan=True)


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
