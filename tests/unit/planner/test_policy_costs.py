"""What the planner knows of KV policies, and the cost of choosing in the cost model."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config.kv import POLICIES, QuestConfig, VerifiedConfig
from models.known_shapes import SHAPES
from planner.cost_model import Choosing, SpeculationCost, acceptance_for, expected_tokens, speedup
from planner.hardware import GPUS
from planner.placed_model import PUBLISHED, PlacedModel
from planner.policy_costs import POLICY_COSTS, PUBLISHED_TOKENS

TARGET = PlacedModel(model=SHAPES["llama-3.1-8b"], device=GPUS["h100"], ranks=1)
CHOOSING = Choosing(verify_bytes=700.0, draft_bytes=5000.0, interval=4)


class TestPolicies:
    def test_are_those_of_the_engine(self) -> None:
        assert set(POLICY_COSTS) == set(POLICIES) - {"topk", "all"}
        assert all(costs.name == name for name, costs in POLICY_COSTS.items())

    def test_views(self) -> None:
        assert {name for name, costs in POLICY_COSTS.items() if costs.is_view} == {"window", "verified", "quest"}

    def test_tokens_read(self) -> None:
        """As settings say of a long row: chosen pages come with the sink and with what is newer."""
        for name, costs in POLICY_COSTS.items():
            assert costs.tokens_read(512) == (537 if name in ("verified", "quest") else 512)
        assert POLICY_COSTS["verified"].tokens_read(256) == VerifiedConfig(policy="verified").tokens_read(10**6, 16)
        assert POLICY_COSTS["quest"].tokens_read(256) == QuestConfig(policy="quest").tokens_read(10**6, 16)

    def test_published_rejections(self) -> None:
        window = 1 - acceptance_for(6, 4.92)
        for name, tokens in {"window": 4.92, "quest": 5.43, "verified": 6.24}.items():
            assert PUBLISHED_TOKENS[name] == tokens
            assert expected_tokens(6, 1 - POLICY_COSTS[name].rejections * window) == pytest.approx(tokens)
        rejections = {name: costs.rejections for name, costs in POLICY_COSTS.items()}
        assert rejections == pytest.approx({"window": 1, "snapkv": 0.75, "verified": 0.32, "quest": 0.714}, abs=1e-3)


class TestChoosing:
    def test_votes(self) -> None:
        """Per page and layer: 4 bytes for 2 voters and 32 query heads, written and read; 3 times 4 for 8 KV heads."""
        votes = POLICY_COSTS["verified"].choosing(TARGET)
        assert votes == Choosing(verify_bytes=32 * (2 * 32 * 8 + 8 * 12) / 16)
        assert [votes.round_bytes(gamma) for gamma in (0, 1, 6)] == [0, 1216, 1216]
        # On 16 ranks, each has 2 query heads, and KV heads are on two ranks each.
        part = POLICY_COSTS["verified"].choosing(replace(TARGET, ranks=16))
        assert part == Choosing(verify_bytes=32 * (2 * 2 * 8 + 1 * 12) / 16)

    def test_bounds_of_keys(self) -> None:
        """Two vectors for each page of 16 keys and values, at the first of four steps."""
        bounds = POLICY_COSTS["quest"].choosing(TARGET)
        assert bounds == Choosing(draft_bytes=131_072 / 16, interval=4)
        chosen = [bounds.round_bytes(gamma) / bounds.draft_bytes for gamma in (0, 1, 4, 5, 8, 9)]
        assert chosen == [0, 1, 1, 2, 2, 3]

    def test_nothing(self) -> None:
        assert {POLICY_COSTS[name].choosing(TARGET) for name in ("window", "snapkv")} == {Choosing()}
        assert Choosing().round_bytes(6) == 0

    @given(st.integers(1, 256), st.integers(1, 100_000), st.integers(0, 16), st.floats(0, 1))
    def test_is_part_of_a_round(self, rows: int, context: int, gamma: int, alpha: float) -> None:
        cost = SpeculationCost(target=TARGET, draft=TARGET, budget=512, choosing=CHOOSING)
        choosing = cost.choosing_seconds(rows, context, gamma)
        nbytes = rows * context * (700 + 5000 * math.ceil(gamma / 4)) if gamma else 0
        assert choosing == pytest.approx(nbytes / (GPUS["h100"].bandwidth * 0.8))
        t_target, t_draft = cost.target_seconds(rows, context), cost.draft_seconds(rows, context)
        verify = cost.verify_seconds(rows, context, gamma) + choosing
        assert cost.speedup(rows, context, gamma, alpha) == speedup(gamma, alpha, t_target, t_draft, verify)

    @given(st.integers(1, 256), st.integers(1, 100_000), st.floats(0, 1), st.floats(1, 50))
    def test_can_only_cost(self, rows: int, context: int, alpha: float, factor: float) -> None:
        """The best gamma is that of the same rounds with choosing in them."""
        free = SpeculationCost(target=TARGET, draft=TARGET, budget=512)
        more = replace(CHOOSING, verify_bytes=700 * factor)
        cost, dear = replace(free, choosing=CHOOSING), replace(free, choosing=more)
        gamma, speed = cost.best_gamma(rows, context, alpha)
        assert free.best_gamma(rows, context, alpha)[1] >= speed >= dear.best_gamma(rows, context, alpha)[1] >= 1
        assert speed == max(cost.speedup(rows, context, each, alpha) for each in range(17))
        assert speed == cost.speedup(rows, context, gamma, alpha)

    @pytest.mark.parametrize("gamma", [None, 4])
    def test_makes_drafting_pay_later(self, gamma: int | None) -> None:
        free = SpeculationCost(target=TARGET, draft=TARGET, budget=512)
        found = [
            replace(free, choosing=each).break_even(64, lambda _: 0.85, gamma)
            for each in (Choosing(), CHOOSING, replace(CHOOSING, verify_bytes=20_000.0))
        ]
        first, later, last = found
        assert first is not None
        assert later is not None
        assert last is not None
        assert first < later < last
        never = replace(free, choosing=replace(CHOOSING, verify_bytes=1e6))
        assert never.break_even(64, lambda _: 0.85, gamma) is None
        assert never.break_even_limit(4, 0.85) == math.inf

    @pytest.mark.parametrize("shared", [0, 2000])
    def test_break_even_of_large_batches(self, shared: int) -> None:
        target = replace(TARGET, efficiency=replace(PUBLISHED, layer_s=0.0))
        choosing = replace(CHOOSING, draft_bytes=50_000.0)
        cost = SpeculationCost(target=target, draft=target, budget=512, shared=shared, choosing=choosing)
        context = cost.break_even(10**7, lambda _: 0.8, 3)
        assert context == pytest.approx(cost.break_even_limit(3, 0.8), rel=0.01)
        assert cost.break_even_limit(3, 0.8) > replace(cost, choosing=Choosing()).break_even_limit(3, 0.8) + 100
