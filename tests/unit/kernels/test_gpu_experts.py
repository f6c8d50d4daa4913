"""Mixtures of experts in Triton against plain torch: on a GPU if there is one, otherwise in Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.ops import Gate
from kernels.reference_experts import LoopedExperts, choose_experts
from kernels.reference_ops import REFERENCE, QuantizedLinear, ReferenceLinear
from kernels.weights.int4_weights import Int4Format
from kernels.weights.matrix import DenseMatrix, Matrix, QuantizedMatrix, regular_groups
from kernels.weights.weight_format import FORMATS
from tests.support.gates import GATES
from tests.support.profiles import each_value, only_in_all

pytest.importorskip("triton", reason="Triton is not installed: there are no builds for this platform")

from kernels.gpu import INTERPRETED
from kernels.gpu.gpu_ops import GpuLinear, GpuOps
from kernels.gpu.products.few_bit_layout import lay_out
from kernels.gpu.products.sorted_pairs import sort_pairs

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") else "cuda")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 6e-3}
"""Largest error, in standard deviations of results."""
ROUNDED_TWICE = {dtype: 2 * error for dtype, error in TOLERANCE.items()}
"""The same where sums are rounded before they are joined."""
FEATURES, SIZE = 40, 72


def matrices(count: int, dtype: torch.dtype) -> list[tuple[DenseMatrix, DenseMatrix]]:
    torch.manual_seed(0)
    shapes = (2 * SIZE, FEATURES), (FEATURES, SIZE)
    made = [[torch.randn(shape) * 2 * shape[1] ** -0.5 for shape in shapes] for _ in range(count)]
    return [(DenseMatrix(a.to(DEVICE, dtype)), DenseMatrix(b.to(DEVICE, dtype))) for a, b in made]


def scores_of(tokens: int, count: int) -> Tensor:
    return torch.randn(tokens, count, generator=torch.Generator().manual_seed(tokens)).to(DEVICE)


@pytest.mark.parametrize(
    ("sizes", "normalised", "dtype"),
    each_value([(1, 8, 2), (5, 3, 3), (19, 6, 2), (150, 4, 2), (0, 4, 2)], [True, False], [*TOLERANCE]),
    ids=str,
)
def test_experts(sizes: tuple[int, int, int], normalised: bool, dtype: torch.dtype) -> None:
    """sizes: tokens, networks, and networks per token."""
    tokens, count, per_token = sizes
    weights, scores = matrices(count, dtype), scores_of(tokens, count)
    x = torch.randn(tokens, FEATURES + 3).to(DEVICE, dtype)[:, :FEATURES]  # rows are not contiguous
    ours, exact = (
        ops.experts(
            [(ops.linear(a, None, gated="silu"), ops.linear(b, None, wide=True)) for a, b in networks],
            per_token=per_token,
            normalised=normalised,
        )(inputs, scores)
        for ops, networks, inputs in (
            (GpuOps(), weights, x),
            (REFERENCE, [(wide(a), wide(b)) for a, b in weights], x.float()),
        )
    )
    assert ours.dtype == torch.float32
    assert ours.shape == (tokens, FEATURES)
    if tokens:
        assert (ours - exact).abs().max() < TOLERANCE[dtype] * exact.std()


def wide(matrix: DenseMatrix) -> DenseMatrix:
    return DenseMatrix(matrix.weight.float())


@pytest.mark.parametrize(("tokens", "count", "per_token"), [(1, 8, 2), (7, 128, 8), (90, 16, 4), (300, 4, 4)])
@pytest.mark.parametrize("one", [True, False])
def test_blocks_hold_every_pair_once(tokens: int, count: int, per_token: int, one: bool) -> None:
    """Whether all tokens chose the same networks or not, in as many blocks as the number of tokens allows."""
    scores = torch.randn(1 if one else tokens, count, generator=torch.Generator().manual_seed(1)).expand(tokens, count)
    chosen, factors = choose_experts(scores, per_token, normalised=True)
    pairs = sort_pairs(chosen, factors, count)
    assert len(pairs.firsts) <= min(tokens * per_token, count + tokens * per_token // 16)
    seen = []
    for network, first, end in zip(pairs.networks.tolist(), pairs.firsts.tolist(), pairs.ends.tolist(), strict=True):
        held = pairs.order[first : min(end, first + pairs.rows)] if first < end else pairs.order[:0]
        assert (chosen.flatten()[held] == network).all()
        seen += held.tolist()
    assert sorted(seen) == list(range(tokens * per_token))


GROUPED: dict[str, Callable[[Tensor], Matrix]] = {
    "dense": lambda weight: DenseMatrix(weight.bfloat16()),
    "int8": FORMATS["int8"].quantize,
    "int8 in groups": lambda weight: in_groups(weight, 32),
    "int4": FORMATS["int4"].quantize,
    "int4 with zero points": Int4Format(32).quantize,
    "int4 without zero points": Int4Format(16, symmetric=True).quantize,
    "int4 in one group": Int4Format(1024, symmetric=True).quantize,
    "int4 in shuffled groups": lambda weight: shuffled(Int4Format(24).quantize(weight)),
    "fp8": FORMATS["fp8"].quantize,
}
"""Formats and layouts of experts: functions that round a matrix."""
MANY = "int4 in shuffled groups"
"""The format whose products read most tensors."""
CODED = [
    pytest.param("int8 in groups", gate) if gate == "clamped_silu" else only_in_all("int8 in groups", gate)
    for gate in GATES
]
"""Gates of weights of few bits. Kernels end alike, whatever the weights."""


def in_groups(weight: Tensor, size: int) -> QuantizedMatrix:
    """Round to 8 bits in groups of `size` features, as MXFP4 and GGUF files are read."""
    groups = regular_groups(weight.shape[1], size)
    largest = torch.stack([weight[:, groups == group].abs().amax(1) for group in range(int(groups[-1]) + 1)], 1)
    scales = largest / 127
    codes = (weight / scales[:, groups]).round().to(torch.int8)
    return QuantizedMatrix(format="int8", codes=codes, scales=scales, mins=None, groups=groups, group_size=size)


def shuffled(matrix: QuantizedMatrix) -> QuantizedMatrix:
    """Move features to other groups, which changes their values."""
    return replace(matrix, groups=matrix.groups[torch.randperm(len(matrix.groups))])


class Case:
    """Networks, two of which compute each token, for GPU kernels and for plain torch in float32."""

    def __init__(
        self,
        rounding: Sequence[Callable[[Tensor], Matrix]],
        gate: Gate = "silu",
        *,
        biased: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        ops: GpuOps | None = None,
    ) -> None:
        """rounding: of each network."""
        torch.manual_seed(0)
        self.ops = ops or GpuOps()
        self.count, self.dtype, features, size = len(rounding), dtype, 80, 48
        self.ours: list[tuple[GpuLinear, GpuLinear]] = []
        theirs = []
        for rounded in rounding:
            gate_up = rounded(torch.randn(2 * size, features) * 4 * features**-0.5).to(DEVICE)
            down = rounded(torch.randn(features, size) * size**-0.5).to(DEVICE)
            a, b = (torch.randn(n).to(DEVICE, dtype) if biased else None for n in (2 * size, features))
            self.ours.append((self.ops.linear(gate_up, a, gated=gate), self.ops.linear(down, b, wide=True)))
            theirs.append((exact(gate_up, a, gate), exact(down, b, None)))
        self.single, self.theirs = theirs, LoopedExperts(theirs, 2, True)

    def check(self, tokens: int) -> None:
        x, scores = torch.randn(tokens, 80).to(DEVICE, self.dtype), scores_of(tokens, self.count)
        expected = self.theirs(x.float(), scores)
        result = self.ops.experts(self.ours, per_token=2, normalised=True)(x, scores)
        assert result.dtype == torch.float32
        assert (result - expected).abs().max() < ROUNDED_TWICE[self.dtype] * expected.std()

    @property
    def tensors(self) -> list[list[Tensor]]:
        """Tensors of all products: one list for those that may share memory."""
        of_places = [[pair[place].product.groupable().tensors for pair in self.ours] for place in (0, 1)]
        return [[each[name] for each in products] for products in of_places for name in products[0]]


def exact(matrix: Matrix, bias: Tensor | None, gated: Gate | None) -> ReferenceLinear:
    """Prepare the product in float32, without rounding of inputs."""
    bias = None if bias is None else bias.float()
    if isinstance(matrix, QuantizedMatrix):
        return QuantizedLinear(matrix, bias, gated, True)
    return ReferenceLinear(matrix.dense(torch.float32), bias, gated, True)


@pytest.mark.parametrize(
    ("name", "tokens", "biased"),
    [
        (name, tokens, biased) if tokens == 1 or name in ("dense", "fp8", MANY) else only_in_all(name, tokens, biased)
        for name in GROUPED
        for tokens, biased in ((1, True), (50, False))
    ],
)
def test_experts_of_every_format(name: str, tokens: int, biased: bool) -> None:
    Case([GROUPED[name]] * 3, "clamped_silu", biased=biased).check(tokens)


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize(("name", "gate"), [("dense", gate) for gate in GATES] + CODED)
def test_experts_with_every_gate(name: str, gate: Gate, biased: bool) -> None:
    Case([GROUPED[name]] * 3, gate, biased=biased).check(20)


@pytest.mark.parametrize(("tokens", "biased"), [(1, True), only_in_all(50, False), (50, True)])
def test_experts_in_fp8_on_gpus_that_multiply_it(tokens: int, biased: bool) -> None:
    Case([GROUPED["fp8"]] * 3, "clamped_silu", biased=biased, ops=GpuOps(multiplies_fp8=True)).check(tokens)


@pytest.mark.parametrize(
    ("name", "dtype"), each_value(["int8 in groups", "int4", "fp8"], [torch.float16, torch.float32]), ids=str
)
def test_experts_of_few_bits_in_other_dtypes(dtype: torch.dtype, name: str) -> None:
    Case([GROUPED[name]] * 3, dtype=dtype).check(9)


def test_int4_in_several_layouts() -> None:
    """Some networks have whole zero points, others minima, others neither: all get minima."""
    formats = Int4Format(32), Int4Format(32, minima=True), Int4Format(32, symmetric=True)
    layouts = [lay_out(each.quantize(torch.randn(96, 80))) for each in formats]
    assert [(each.has_zeros, each.mins is None) for each in layouts] == [(True, True), (False, False), (False, True)]
    case = Case([each.quantize for each in formats])
    case.check(9)
    x = torch.randn(3, 80).to(DEVICE, case.dtype)
    for ours, theirs in zip(case.ours, case.single, strict=True):  # single networks compute the same as before
        expected = theirs[1](theirs[0](x.float()))
        assert (ours[1](ours[0](x)) - expected).abs().max() < ROUNDED_TWICE[case.dtype] * expected.std()


@pytest.mark.parametrize("name", [name if name in ("dense", "fp8", MANY) else only_in_all(name) for name in GROUPED])
def test_weights_are_moved_not_copied(name: str) -> None:
    case = Case([GROUPED[name]] * 3, biased=True)
    taken = sum(linear.nbytes for pair in case.ours for linear in pair)
    x = torch.randn(4, 80).to(DEVICE, case.dtype)
    before = [down(gate_up(x)) for gate_up, down in case.ours]
    case.ops.experts(case.ours, per_token=2, normalised=True)
    assert sum(linear.nbytes for pair in case.ours for linear in pair) == taken
    for tensors in case.tensors:
        assert len({each.untyped_storage().data_ptr() for each in tensors}) == 1
    for (gate_up, down), expected in zip(case.ours, before, strict=True):
        assert torch.equal(down(gate_up(x)), expected)


def test_networks_of_several_formats_are_refused() -> None:
    case = Case([GROUPED["int8"], GROUPED["int4"]])
    with pytest.raises(ValueError, match="the experts of a layer have weights of different formats"):
        case.check(1)


@pytest.mark.skipif(not INTERPRETED, reason="tests/gpu captures graphs")
@pytest.mark.parametrize("name", ["dense", only_in_all("int8 in groups"), "int4 in shuffled groups"])
def test_experts_are_captured(name: str) -> None:
    """Nothing asks the device a question."""
    from tests.support.recorded import Recorded

    case = Case([GROUPED[name]] * 3, "clamped_silu", biased=True)
    experts = case.ops.experts(case.ours, per_token=2, normalised=True)
    x, scores, held = torch.randn(5, 80).to(case.dtype), scores_of(5, 3), {}

    def work() -> None:
        held["sums"] = experts(x, scores)

    replay = Recorded().capture(work)
    x.copy_(torch.randn(5, 80))
    scores.copy_(torch.randn(5, 3))
    replay()
    assert torch.equal(held["sums"], experts(x, scores))
