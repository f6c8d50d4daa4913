"""Mixtures of experts in Triton against plain torch: on a GPU if there is one, otherwise in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from kernels.reference_experts import choose_experts
from kernels.reference_ops import REFERENCE
from kernels.weights.int8_weights import Int8Format
from kernels.weights.matrix import DenseMatrix

pytest.importorskip("triton", reason="Triton is not installed: there are no builds for this platform")

from kernels.gpu.gpu_experts import sort_pairs
from kernels.gpu.gpu_ops import GpuOps

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") else "cuda")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 6e-3}
"""Largest error, in standard deviations of results."""
FEATURES, SIZE = 40, 72


def matrices(count: int, dtype: torch.dtype) -> list[tuple[DenseMatrix, DenseMatrix]]:
    torch.manual_seed(0)
    shapes = (2 * SIZE, FEATURES), (FEATURES, SIZE)
    made = [[torch.randn(shape) * 2 * shape[1] ** -0.5 for shape in shapes] for _ in range(count)]
    return [(DenseMatrix(a.to(DEVICE, dtype)), DenseMatrix(b.to(DEVICE, dtype))) for a, b in made]


def scores_of(tokens: int, count: int) -> Tensor:
    return torch.randn(tokens, count, generator=torch.Generator().manual_seed(tokens)).to(DEVICE)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize(("tokens", "count", "per_token"), [(1, 8, 2), (5, 3, 3), (19, 6, 2), (150, 4, 2), (0, 4, 2)])
def test_experts(tokens: int, count: int, per_token: int, normalised: bool, dtype: torch.dtype) -> None:
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


def test_weights_are_moved_not_copied() -> None:
    ops = GpuOps()
    pairs = [(ops.linear(a, None, gated="silu"), ops.linear(b, None, wide=True)) for a, b in matrices(3, torch.float32)]
    x = torch.randn(4, FEATURES).to(DEVICE)
    before = [b(a(x)) for a, b in pairs]
    ops.experts(pairs, per_token=2, normalised=True)
    for (a, b), expected in zip(pairs, before, strict=True):
        assert torch.equal(b(a(x)), expected)
    storages = {linear.dense.weight.untyped_storage().data_ptr() for pair in pairs for linear in pair if linear.dense}
    assert len(storages) == 2


def test_weights_of_few_bits_are_refused() -> None:
    ops = GpuOps()
    pairs = [
        (ops.linear(Int8Format().quantize(a.weight), None, gated="silu"), ops.linear(b, None, wide=True))
        for a, b in matrices(2, torch.float32)
    ]
    with pytest.raises(ValueError, match="GPUs multiply only dense experts"):
        ops.experts(pairs, per_token=1, normalised=True)
