"""Forecasts of models with experts: experts that a forward meets, and what they cost."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.known_shapes import SHAPES
from models.model_config import ExpertsConfig, ModelConfig
from models.shapes import (
    active_parameters,
    distinct_experts,
    matrix_bytes,
    parameters,
    rank_matrix_bytes,
    rank_weight_bytes,
)
from planner.cost_model import SpeculationCost
from planner.forecast import ForecastError, deploy
from planner.hardware import GPUS, Device
from planner.placed_model import Efficiency, PlacedModel
from tests.support.small_shape import SMALL, SMALL_ACTIVE

EXPERTS = ExpertsConfig(count=8, per_token=2, size=6, shared_size=4, dense_layers=(1,))
MIXED = replace(SMALL, experts=EXPERTS)
# Two of three layers: a router and the shared expert's gate 9·10, the shared expert 3·10·4; an expert 3·10·6.
BESIDE, ROUTERS, EXPERT = SMALL_ACTIVE - 2 * 600 + 2 * 120, 2 * 90, 2 * 180


@pytest.mark.parametrize(("count", "per_token"), [(8, 2), (128, 8), (32, 4)])
@pytest.mark.parametrize("tokens", [1, 3, 16, 100])
def test_distinct_experts_of_a_simulation(count: int, per_token: int, tokens: int) -> None:
    draw = random.Random(count * tokens)
    trials = 600
    met = sum(
        len({expert for _ in range(tokens) for expert in draw.sample(range(count), per_token)}) for _ in range(trials)
    )
    expected = distinct_experts(ExpertsConfig(count=count, per_token=per_token, size=1), tokens)
    assert met / trials == pytest.approx(expected, rel=0.02)


def test_distinct_experts_at_the_ends() -> None:
    assert distinct_experts(EXPERTS, 0) == 0
    assert distinct_experts(EXPERTS, 1) == pytest.approx(2)
    assert distinct_experts(EXPERTS, 1000) == pytest.approx(8)
    assert distinct_experts(replace(EXPERTS, per_token=8), 1) == 8


def test_parameters_by_hand() -> None:
    assert active_parameters(MIXED) == BESIDE + ROUTERS + 2 * EXPERT
    assert parameters(MIXED) == BESIDE + ROUTERS + 8 * EXPERT + 1000 + 3 * 20 + 10
    assert parameters(replace(MIXED, experts=replace(EXPERTS, dense_layers=(0, 1, 2)))) == parameters(SMALL)


def test_bytes() -> None:
    """Routers are dense in every format, and whole on every rank."""
    assert matrix_bytes(MIXED, 2) == 2 * (BESIDE + ROUTERS + 8 * EXPERT)
    assert matrix_bytes(MIXED, 2, tokens=1) == pytest.approx(2 * active_parameters(MIXED))
    assert matrix_bytes(MIXED, 2, tokens=2) == pytest.approx(2 * (BESIDE + ROUTERS + 3.5 * EXPERT))
    assert matrix_bytes(MIXED, 2, "int8") == BESIDE + 2 * ROUTERS + 8 * EXPERT
    assert matrix_bytes(MIXED, 2, "int4") == 1000 + (BESIDE - 1000 + 8 * EXPERT) * 5 / 8 + 2 * ROUTERS
    assert rank_matrix_bytes(MIXED, 2, 2) == BESIDE + 2 * ROUTERS + 8 * EXPERT
    others = 2 * (1000 + 3 * 20 + 10)
    assert rank_weight_bytes(MIXED, 1, 2) == matrix_bytes(MIXED, 2) + others == 2 * parameters(MIXED)


def test_experts_alone_of_four_bits() -> None:
    """gpt-oss: 24 layers of 32 experts of 3 · 2880² weights in 4.25 bits; biases, routers and all else in 16."""
    shape, experts = SHAPES["gpt-oss-20b"], 24 * 32 * 3 * 2880 * 2880
    assert rank_weight_bytes(shape, 1, 2, "mxfp4") == 2 * (parameters(shape) - experts) + experts * 4.25 / 8
    for weights, drafts in (("mxfp4", None), ("dense", "mxfp4")):
        with pytest.raises(ForecastError, match=r"llama-3\.1-8b has no experts"):
            deploy(
                model="llama-3.1-8b",
                draft="self",
                gpu="h100",
                ranks=1,
                policy="window",
                dtype="bfloat16",
                alpha=None,
                weights=weights,
                draft_weights=drafts,
            )


class TestForwards:
    ROUND = Device(name="round", flops=1e9, bandwidth=1e5, memory=1e6, link=1e4, all_reduce_s=0.001)
    EXACT = Efficiency(flops=0.5, weights=0.8, kv=0.5, verify_attention=1.0, layer_s=0.0)

    def place(self, model: ModelConfig, **fields: Any) -> PlacedModel:
        return PlacedModel(model=model, device=replace(self.ROUND, **fields), ranks=1, efficiency=self.EXACT)

    def test_read_the_experts_that_their_tokens_meet(self) -> None:
        placed = self.place(MIXED)
        for rows, queries in ((1, 1), (4, 1), (4, 5)):
            read = 2 * (BESIDE + ROUTERS + distinct_experts(EXPERTS, rows * queries) * EXPERT)
            assert placed.forward_seconds(rows, 0, queries) == pytest.approx(read / 8e4)
        assert placed.read_bytes(4, 0) == pytest.approx(2 * (BESIDE + ROUTERS + distinct_experts(EXPERTS, 4) * EXPERT))

    def test_compute_with_those_of_each_token(self) -> None:
        placed = self.place(MIXED, flops=1e3)
        assert placed.forward_seconds(100, 0, 3) == pytest.approx(2 * 300 * active_parameters(MIXED) / 500)

    def test_verify_passes_read_more_weights(self) -> None:
        """Without experts, a pass that reading bounds takes as long as a plain step."""
        ratios = []
        for model in (SMALL, MIXED):
            placed = self.place(model)
            cost = SpeculationCost(target=placed, draft=placed, budget=16)
            ratios.append(cost.verify_seconds(2, 0, 6) / cost.target_seconds(2, 0))
        assert ratios[0] == pytest.approx(1)
        assert ratios[1] == pytest.approx(matrix_bytes(MIXED, 2, tokens=14) / matrix_bytes(MIXED, 2, tokens=2))

    @given(st.sampled_from(["qwen3-30b-a3b", "mixtral-8x7b"]), st.integers(1, 512), st.integers(1, 512))
    def test_more_tokens_read_no_less(self, model: str, tokens: int, more: int) -> None:
        shape = SHAPES[model]
        some, others, every = (matrix_bytes(shape, 2, tokens=each) for each in (tokens, tokens + more, None))
        assert 2 * active_parameters(shape) * (1 - 1e-9) <= some <= others <= every


def test_memory_holds_all_experts() -> None:
    deployment = deploy(
        model="qwen3-30b-a3b", draft="self", gpu="h100", ranks=1, policy="window", dtype="bfloat16", alpha=0.8
    )
    found = deployment.forecast(1, 10_000, budgets=(512,), gamma=3)
    assert found.weight_bytes == 2 * 30_532_122_624
    assert found.largest_batch == (0.9 * GPUS["h100"].memory - found.weight_bytes) // (10_004 * 98_304)
