"""Forecasts of models whose layers slide: KV that is read, and KV that is kept."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config.deployment import EngineConfig
from engine.worker.sliding_limits import grouped
from models.known_shapes import SHAPES
from models.model_config import ModelConfig
from models.shapes import kv_token_bytes, rank_kv_token_bytes, rank_sliding_token_bytes
from planner.cost_model import SpeculationCost
from planner.forecast import CHUNK, Deployment, ForecastError, deploy
from planner.hardware import GPUS, Device
from planner.placed_model import Efficiency, PlacedModel
from planner.policy_costs import POLICY_COSTS
from tests.support.small_shape import SMALL, SMALL_ACTIVE

ROUND = Device(name="round", flops=1e9, bandwidth=1e5, memory=1e6, link=1e4, all_reduce_s=0.001)
EXACT = Efficiency(flops=0.5, weights=0.8, kv=0.5, verify_attention=1.0, layer_s=0.0)
SLIDING = replace(SMALL, sliding_window=100, sliding_layers=(0, 2))
ALL_SLIDE = replace(SMALL, sliding_window=100, sliding_layers=(0, 1, 2))
KEPT = replace(ALL_SLIDE, keeps_all_kv=True)
LINEAR = 2 * SMALL_ACTIVE / 8e4
"""Seconds of matrix products."""


def place(model: ModelConfig, **fields: Any) -> PlacedModel:
    usual: dict[str, Any] = {"device": ROUND, "ranks": 1, "efficiency": EXACT}
    return PlacedModel(model=model, **usual | fields)


def deployed(model: ModelConfig, policy: str = "window", gpu: str = "h100", **fields: Any) -> Deployment:
    target = place(model, device=GPUS[gpu])
    usual: dict[str, Any] = {"model": "m", "draft": "self", "target": target, "drafter": target, "policy": policy}
    return Deployment(**usual | {"alpha": 0.8} | fields)


def test_bytes_of_a_token() -> None:
    """A layer of SMALL has 2·2·2·2 bytes per token. Sliding layers are dense in every format."""
    assert (kv_token_bytes(SLIDING, 2), rank_sliding_token_bytes(SLIDING, 1, 2)) == (16, 32)
    assert (kv_token_bytes(ALL_SLIDE, 2), rank_sliding_token_bytes(ALL_SLIDE, 1, 2)) == (0, 48)
    assert (kv_token_bytes(KEPT, 2), rank_sliding_token_bytes(KEPT, 1, 2)) == (48, 0)
    assert rank_kv_token_bytes(SLIDING, 2, 2, "fp8") == 4
    assert rank_sliding_token_bytes(SLIDING, 2, 2) == 16
    assert place(SLIDING, kv_format="fp8").kv_read_bytes(1, 1000, 100) == 8 * 1000 + 32 * 100


class TestReads:
    @pytest.mark.parametrize("context", [60, 100, 1000])
    def test_windows(self, context: int) -> None:
        cost = SpeculationCost(target=place(SLIDING), draft=place(SLIDING), budget=64)
        window, chosen = min(context, 100), min(context, 64)
        for seconds, tokens in (
            (cost.target_seconds(4, context), context),
            (cost.verify_seconds(4, context, 3), context),
            (cost.draft_seconds(4, context), chosen),
        ):
            assert seconds == pytest.approx(LINEAR + 4 * (16 * tokens + 32 * window) / 5e4)
        assert cost.draft_row_bytes(context) == 16 * chosen + 32 * window
        assert cost.draft_bytes(4, context) == 2 * SMALL_ACTIVE + 4 * cost.draft_row_bytes(context)
        assert place(SLIDING).forward_seconds(4, 4 * context) == cost.target_seconds(4, context)

    def test_products(self) -> None:
        slow = place(SLIDING, device=replace(ROUND, flops=1e5, bandwidth=1e9))
        cost = SpeculationCost(target=slow, draft=slow, budget=64)
        products = 4 * 4 * 2 * (1 * 1000 + 2 * 100) * 2  # layers by tokens, two queries
        assert cost.verify_seconds(1, 1000, 1) == pytest.approx((2 * 2 * SMALL_ACTIVE + products) / 5e4)

    def test_rows_share_no_windows(self) -> None:
        cost = SpeculationCost(target=place(SLIDING), draft=place(SLIDING), budget=64, shared=900)
        read = 16 * (900 + 4 * 100) + 32 * 4 * 100
        assert cost.target_seconds(4, 1000) == pytest.approx(LINEAR + read / 5e4)

    def test_all_layers_slide(self) -> None:
        """Plain steps read the window, drafts their budget."""
        cost = SpeculationCost(target=place(KEPT), draft=place(KEPT), budget=64, shared=900)
        assert cost.target_seconds(4, 1000) == pytest.approx(LINEAR + 4 * 48 * 100 / 5e4)
        assert cost.draft_seconds(4, 1000) == pytest.approx(LINEAR + 4 * 48 * 64 / 5e4)
        assert replace(cost, budget=None).draft_seconds(4, 1000) == cost.target_seconds(4, 1000)

    def test_drafts_read_less_than_a_window(self) -> None:
        """A budget below the window bounds what they read in sliding layers, if their policy does."""
        cost = SpeculationCost(target=place(SLIDING), draft=place(SLIDING), budget=64, narrows=True)
        assert cost.draft_row_bytes(1000) == (16 + 32) * 64
        assert replace(cost, budget=128).draft_row_bytes(1000) == 16 * 128 + 32 * 100
        assert replace(cost, budget=None).draft_row_bytes(1000) == 16 * 1000 + 32 * 100
        assert cost.draft_seconds(4, 1000) == pytest.approx(LINEAR + 4 * (16 + 32) * 64 / 5e4)
        assert cost.target_seconds(4, 1000) == replace(cost, narrows=False).target_seconds(4, 1000)
        for policy, row in (("window", 10 * 512 + 52 * 512), ("quest", 10 * (512 + 16 + 9) + 52 * 1024)):
            found = deployed(SHAPES["gemma-3-27b"], policy).forecast(1, 8000, budgets=(512,), gamma=3)
            assert found.draft_row_read_bytes == 8192 * row

    def test_choosing_is_among_the_other_layers(self) -> None:
        for policy, costs in POLICY_COSTS.items():
            chosen, every = (costs.choosing(place(each)).round_bytes(4) for each in (SLIDING, SMALL))
            assert chosen == pytest.approx(every / 3), policy

    @given(st.integers(1, 64), st.integers(100, 60_000), st.integers(1, 8), st.floats(0.5, 0.95))
    def test_sliding_layers_leave_less_to_save(self, rows: int, context: int, gamma: int, alpha: float) -> None:
        """Drafts read the window as a plain step does, so they gain less than without sliding layers."""
        speeds = []
        for model in (SMALL, SLIDING):
            placed = place(model, device=replace(ROUND, flops=1e30))
            cost = SpeculationCost(target=placed, draft=placed, budget=64)
            speeds.append(cost.speedup(rows, context, gamma, alpha))
        assert speeds[1] <= speeds[0] * (1 + 1e-9)


class TestBreakEven:
    def test_limit_is_what_large_batches_come_to(self) -> None:
        target = place(SLIDING, device=replace(ROUND, flops=1e6))
        cost = SpeculationCost(target=target, draft=target, budget=64)
        limit = cost.break_even_limit(3, 0.8)
        assert 100 < limit < 100_000
        assert cost.break_even(10**7, lambda _: 0.8, 3) == pytest.approx(limit, rel=0.01)

    def test_limit_is_not_below_a_window(self) -> None:
        target = place(SLIDING, device=replace(ROUND, flops=1e30))
        cost = SpeculationCost(target=target, draft=target, budget=1)
        assert cost.break_even_limit(1, 0.99) == 100

    def test_limit_where_all_layers_slide(self) -> None:
        target = place(KEPT, device=replace(ROUND, flops=1e30))
        cost = SpeculationCost(target=target, draft=target, budget=16)
        assert cost.break_even_limit(2, 0.8) == pytest.approx(2 * 16 / (0.8 + 0.64))
        assert replace(cost, budget=99).break_even_limit(2, 0.8) == math.inf


class TestMemory:
    """Gemma 3 27B: 10 layers keep all KV, 81,920 bytes per token; 52 a window of 1,024, 425,984 per token."""

    def test_both_groups(self) -> None:
        found = deployed(SHAPES["gemma-3-27b"]).forecast(4, 8000, budgets=(512,), gamma=3)
        window = 16 * (math.ceil((1024 + 3) / 16) + 3)
        assert found.kv_bytes == 4 * 8004 * 81_920 + (4 * window + CHUNK) * 425_984
        assert found.memory_bytes == found.weight_bytes + found.kv_bytes
        free = found.usable_bytes - found.weight_bytes - CHUNK * 425_984
        assert found.largest_batch == free // (8004 * 81_920 + window * 425_984)

    @pytest.mark.parametrize(
        ("policy", "kv_format", "kept"), [("window", "dense", 1), ("quest", "dense", 2), ("window", "fp8", 2)]
    )
    def test_all_layers_slide(self, policy: str, kv_format: str, kept: int, tmp_path: Path) -> None:
        """Only a window is kept, unless drafts choose among all KV, or it has few bits."""
        shape = {"model_type": "mistral", "sliding_window": 256, "max_position_embeddings": 8192}
        sizes = {
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
        }
        (tmp_path / "config.json").write_text(json.dumps({**shape, **sizes, "vocab_size": 300}), encoding="utf-8")
        usual: dict[str, Any] = {"draft": "self", "gpu": "h100", "ranks": 1, "dtype": "bfloat16", "alpha": 0.8}
        made = deploy(model=str(tmp_path), policy=policy, kv_format=kv_format, **usual)
        found = made.forecast(4, 8000, budgets=(64,), gamma=3)
        row = 2 * 2 * 64 * (2 if kv_format == "dense" else 1)
        window = 16 * (math.ceil((256 + 3) / 16) + 3)
        least = (4 * window + CHUNK) * row
        assert found.kv_bytes == (least if kept == 1 else 4 * 8004 * row)
        assert made.forecast(4, 8000, budgets=(None,), gamma=3).kv_bytes == (
            4 * 8004 * row if kv_format == "fp8" else least
        )
        wide = made.forecast(4, 8000, budgets=(512,), gamma=3)  # no more than the window
        assert wide.draft_row_read_bytes == 256 * row or policy == "quest"
        assert (found.draft_bytes > 0) is (policy == "quest")

    @pytest.mark.parametrize("policy", ["window", "quest", "snapkv"])
    @pytest.mark.parametrize("draft", ["self", "small"])
    @pytest.mark.parametrize("kv_format", ["dense", "int8"])
    @pytest.mark.parametrize("budget", [None, 256])
    def test_a_server_keeps_the_same(self, policy: str, draft: str, kv_format: str, budget: int | None) -> None:
        target = place(ALL_SLIDE, device=GPUS["h100"], kv_format=kv_format)
        made = deployed(ALL_SLIDE, policy, target=target, draft=draft, drafter=replace(target, model=SMALL))
        drafter = {"drafter": "self"} if draft == "self" else {"drafter": "model", "model": draft}
        kv = {"policy": "all"} if budget is None else {"policy": policy, "budget": budget}
        config = EngineConfig.model_validate({"cache": {"format": kv_format}, "speculation": {**drafter, "kv": kv}})
        kept = rank_kv_token_bytes(grouped(config, ALL_SLIDE), 1, 2, kv_format)
        found, longer = (made.forecast(1, context, budgets=(budget,), gamma=3) for context in (8000, 8001))
        assert longer.kv_bytes - found.kv_bytes == kept

    def test_no_more_than_other_layers(self) -> None:
        found = deployed(SHAPES["gemma-3-27b"]).forecast(2, 1000, budgets=(512,), gamma=3)
        assert found.kv_bytes == 2 * 1004 * (81_920 + 425_984)

    @pytest.mark.parametrize("context", [500, 1000, 8000, 60_000])
    @pytest.mark.parametrize("shared", [0, 400])
    @pytest.mark.parametrize("policy", ["window", "snapkv", "quest"])
    def test_largest_batch_is_largest(self, context: int, shared: int, policy: str) -> None:
        deployment = deployed(SHAPES["gpt-oss-20b"], policy)
        most = deployment.forecast(1, context, budgets=(None,), gamma=3, shared=shared).largest_batch
        found, beyond = (
            deployment.forecast(rows, context, budgets=(None,), gamma=3, shared=shared) for rows in (most, most + 1)
        )
        assert found.fits
        assert found.memory_bytes <= found.usable_bytes < beyond.memory_bytes
        assert not beyond.fits

    def test_what_policies_keep_is_of_the_other_layers(self) -> None:
        model = SHAPES["gemma-3-27b"]
        found = deployed(model, "snapkv").forecast(1, 8000, budgets=(512,), gamma=3)
        queries = (32 + 3) * 10 * 32 * 128 * 2
        assert found.draft_bytes == (512 + 3) * 81_920 + queries
        bounds = deployed(model, "quest").forecast(1, 8000, budgets=(512,), gamma=3)
        assert bounds.draft_bytes == 8004 * 81_920 / 16


def test_what_a_server_refuses() -> None:
    draft = place(SLIDING, device=GPUS["h100"])
    with pytest.raises(ForecastError, match="some layers of small slide"):
        deployed(SMALL, draft="small", drafter=draft).forecast(1, 1000, budgets=(512,), gamma=3)
    with pytest.raises(ForecastError, match="all layers of m slide"):
        deployed(ALL_SLIDE, "verified").forecast(1, 1000, budgets=(512,), gamma=3)
    assert deployed(SLIDING, "verified").forecast(1, 1000, budgets=(512,), gamma=3).fits
