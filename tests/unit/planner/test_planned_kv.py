"""KV of fewer bits in forecasts: bytes read and kept, page sizes, acceptance of drafts that read 4 bits; the flag."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from engine.batch.tail_pages import TailPages, num_exact_pages
from engine.plan import RoundPlan, RowWork
from kernels.kv.kv_bits import EXACT_PAGES, SEALED_GROUP
from models.known_shapes import SHAPES
from models.shapes import rank_weight_bytes
from planner.cost_model import SpeculationCost
from planner.forecast import Deployment, Forecast, ForecastError, deploy
from planner.hardware import GPUS
from planner.placed_model import PUBLISHED, PlacedModel
from server.cli.app import app
from tests.support.engines import TINY, tiny_engine, tiny_model

DENSE, INT8, UPPER, FP8 = 131_072, 68_608, 35_840, 65_536
"""Bytes of Llama-3.1-8B's KV per token: of each of 256 heads 512, (17,408 - 256) / 64, (9,216 - 256) / 64 and 256."""
STORED = {"dense": DENSE, "int8": INT8, "int4x2": INT8, "fp8": FP8}
DRAFTED = STORED | {"int4x2": UPPER}


def place(kv_format: str, **fields: Any) -> PlacedModel:
    return PlacedModel(model=SHAPES["llama-3.1-8b"], device=GPUS["h100"], ranks=1, kv_format=kv_format, **fields)


def deployed(kv_format: str, policy: str = "window", draft: str = "self", alpha: float | None = 0.8) -> Deployment:
    where: dict[str, Any] = {"model": "llama-3.1-8b", "gpu": "h100", "ranks": 1, "dtype": "bfloat16"}
    return deploy(**where, draft=draft, policy=policy, alpha=alpha, kv_format=kv_format)


def found(kv_format: str, policy: str = "window", budget: int | None = 512, draft: str = "self") -> Forecast:
    return deployed(kv_format, policy, draft).forecast(4, 8000, budgets=(budget,), gamma=3)


def exact(kv_format: str, tokens: int) -> int:
    """Return how many of the latest tokens are read exactly, of `tokens`."""
    return 0 if kv_format in ("dense", "fp8") else tokens


def test_exact_tokens_are_those_of_the_engine() -> None:
    """A row that decodes token by token: groups that it holds are exact for drafts, and its own for the target."""
    tails, own, held = TailPages(1, EXACT_PAGES, SEALED_GROUP), [], []
    for computed in range(SEALED_GROUP * 10):
        tails.update(RoundPlan(number=0, starts=[], pages=[], work=[RowWork(0, computed, 1, 0, True)]))
        if computed >= SEALED_GROUP * 2:
            own.append(computed % SEALED_GROUP)
            held.append(computed - SEALED_GROUP * min(tails.held[0]))
    assert place("int8").exact_tokens == pytest.approx(mean(own), abs=1)
    assert place("int8", drafts=True).exact_tokens == pytest.approx(mean(held), abs=1)
    assert place("dense", drafts=True).exact_tokens == place("fp8", drafts=True).exact_tokens == 0


@pytest.mark.parametrize("kv_format", STORED)
class TestBytes:
    def test_forwards(self, kv_format: str) -> None:
        """The target reads 32 tokens of each row exactly, drafts 96; products take as long as ever."""
        rate = GPUS["h100"].bandwidth * PUBLISHED.kv
        for drafts, tail, each in ((False, 32, STORED), (True, 96, DRAFTED)):
            placed, latest = place(kv_format, drafts=drafts), exact(kv_format, tail)
            nbytes = 4 * (latest * DENSE + (8000 - latest) * each[kv_format])
            assert placed.kv_read_bytes(4, 4 * 8000) == nbytes
            assert placed.read_bytes(4, 4 * 8000) - placed.read_bytes(4, 0) == nbytes
            took = placed.forward_seconds(4, 4 * 8000) - placed.forward_seconds(4, 0)
            assert took == pytest.approx(nbytes / rate)
            shared = placed.forward_seconds(4, 4 * 8000, shared_tokens=3 * 8000) - placed.forward_seconds(4, 0)
            assert shared == pytest.approx((nbytes - 3 * 8000 * each[kv_format]) / rate)
            assert placed.kv_read_bytes(4, 4 * 10) == 4 * 10 * (DENSE if latest else each[kv_format])
            slow = replace(placed, device=replace(placed.device, flops=1e9))
            assert slow.forward_seconds(4, 32_000) == replace(slow, kv_format="dense").forward_seconds(4, 32_000)

    def test_memory(self, kv_format: str) -> None:
        """A row's tokens, and its exact pages of 2 x 64 tokens."""
        deployment, row = found(kv_format), 8004 * STORED[kv_format] + exact(kv_format, 128) * DENSE
        assert deployment.kv_format == kv_format
        assert deployment.kv_bytes == 4 * row
        assert deployment.draft_bytes == 0
        weights = rank_weight_bytes(SHAPES["llama-3.1-8b"], 1, 2)
        assert deployment.memory_bytes == weights + 4 * row
        assert deployment.largest_batch == (0.9 * 80e9 - weights) // row

    def test_drafts_that_read_the_targets_pages(self, kv_format: str) -> None:
        """Chosen pages come with a first page and half a page and one token of new ones: pages of 64 if sealed."""
        sealed = exact(kv_format, 1)
        for policy, read in {
            "window": 512,
            "verified": 609 if sealed else 537,
            "quest": 609 if sealed else 537,
        }.items():
            latest = exact(kv_format, 96)
            nbytes = latest * DENSE + (read - latest) * DRAFTED[kv_format]
            assert found(kv_format, policy).draft_row_read_bytes == nbytes
        latest = exact(kv_format, 96)
        everything = found(kv_format, budget=None)
        assert everything.draft_row_read_bytes == latest * DENSE + (8000 - latest) * DRAFTED[kv_format]

    def test_drafts_with_kv_of_their_own(self, kv_format: str) -> None:
        """A draft model's window or pages are dense. SnapKV's cache has the numbers that tokens are written in."""
        copied = "fp8" if kv_format == "fp8" else "dense"
        for policy, budget, draft, own in (
            ("snapkv", 512, "self", copied),
            ("window", 512, "llama-3.2-1b", "dense"),
            ("window", None, "llama-3.2-1b", "dense"),
        ):
            ours, dense = (found(each, policy, budget, draft) for each in (kv_format, own))
            for name in ("draft_row_read_bytes", "draft_read_bytes", "t_draft_ms", "draft_bytes"):
                assert getattr(ours, name) == getattr(dense, name)

    def test_bounds_of_keys(self, kv_format: str) -> None:
        """Two dense vectors for each page, kept and read."""
        page = 64 if exact(kv_format, 1) else 16
        forecast = found(kv_format, "quest")
        assert forecast.draft_bytes == 4 * 8004 * DENSE / page
        rate = GPUS["h100"].bandwidth * PUBLISHED.kv
        assert forecast.t_choose_ms == pytest.approx(1e3 * 4 * 8000 * DENSE / page / rate)

    def test_votes(self, kv_format: str) -> None:
        forecast, dense = found(kv_format, "verified"), found("dense", "verified")
        assert forecast.t_choose_ms == pytest.approx(dense.t_choose_ms / (4 if exact(kv_format, 1) else 1))

    @pytest.mark.parametrize("shared", [0, 2000])
    def test_break_even_of_large_batches(self, kv_format: str, shared: int) -> None:
        target = place(kv_format, efficiency=replace(PUBLISHED, layer_s=0.0))
        cost = SpeculationCost(target=target, draft=replace(target, drafts=True), budget=512, shared=shared)
        assert cost.break_even(10**7, lambda _: 0.8, 3) == pytest.approx(cost.break_even_limit(3, 0.8), abs=2)


@pytest.mark.parametrize("kv_format", STORED)
def test_copies_of_tokens_are_those_of_the_engine(kv_format: str) -> None:
    """SnapKV's cache, and the queries that choose."""
    engine = tiny_engine(
        tiny_model(dtype=torch.float32),
        gamma=2,
        page_size=64,
        speculation={"kv": {"policy": "snapkv", "budget": 256, "recent": 64}},
        cache={"format": kv_format},
    )
    drafter: Any = engine._worker._drafter
    policy = drafter._drafter._policy
    target = PlacedModel(model=TINY, device=GPUS["h100"], ranks=1, element_bytes=4, kv_format=kv_format)
    deployment = Deployment(model="tiny", draft="self", target=target, drafter=target, policy="snapkv", alpha=0.8)
    forecast = deployment.forecast(1, 500, budgets=(256,), gamma=2)
    token, query = policy.pool.bytes_per_page / 64, policy._queries[:, 0].nbytes
    kept = deployment.costs.state(256, 2, "self")
    assert forecast.draft_bytes == kept.pages * token + kept.queries * query
    assert forecast.draft_row_read_bytes == 256 * token
    # The engine counts what it allocates.
    exact = num_exact_pages(engine._config) * 64 * target.dense_kv_bytes(1)
    assert engine._resolved.fixed_bytes == policy.pool.nbytes + policy._queries.nbytes + exact


def test_page_sizes() -> None:
    for kv_format in ("dense", "fp8"):
        found(kv_format, budget=96)
    for kv_format in ("int8", "int4x2"):
        with pytest.raises(ForecastError, match=r"speculation.kv.budget \(96\) must be a multiple .* \(64\)"):
            found(kv_format, budget=96)


def test_acceptance_of_drafts_that_read_four_bits() -> None:
    """At most 0.9; SnapKV's cache and draft models have other numbers."""

    def alpha(kv_format: str, budget: int | None, policy: str = "window", draft: str = "self") -> float:
        return deployed(kv_format, policy, draft, alpha=None).expected_alpha(budget, 32_000)

    assert [alpha(each, None) for each in STORED] == [1.0, 1.0, 0.9, 1.0]
    assert [alpha(each, 512) for each in STORED] == [0.81] * 4
    assert [alpha(each, 512, "verified") for each in ("dense", "int4x2")] == pytest.approx(
        [1 - 0.32 * 0.19, 0.9], abs=1e-3
    )
    assert alpha("int4x2", 2048, "snapkv") == alpha("dense", 2048, "snapkv") > 0.9
    assert alpha("int4x2", None, draft="llama-3.2-1b") == 0.75


def test_the_flag(tmp_path: Path) -> None:
    def plan(*arguments: str) -> tuple[dict[str, Any], str]:
        where = ("plan", "--model", "llama-3.1-8b", "--gpu", "h100", "--batch", "8", "--context", "32000")
        told = ("--gamma", "3", "--budget", "all", "--alpha", "0.8", "--json", str(tmp_path / "plan.json"))
        done = CliRunner().invoke(app, [*where, *told, *arguments])
        assert done.exit_code == 0, done.output
        (row,) = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
        return row, done.stdout

    rows = {name: plan("--kv-format", name)[0] for name in STORED}
    assert rows["dense"] == plan()[0]
    assert [row["kv_format"] for row in rows.values()] == list(STORED)
    batches = {name: row["largest_batch"] for name, row in rows.items()}
    assert batches["fp8"] > batches["int8"] == batches["int4x2"] > 1.8 * batches["dense"]
    for name in ("t_target_ms", "t_verify_ms"):
        assert rows["fp8"][name] < rows["int8"][name] == rows["int4x2"][name] < rows["dense"][name]
    assert rows["int4x2"]["t_draft_ms"] < rows["fp8"]["t_draft_ms"] < rows["int8"]["t_draft_ms"]
    assert ", self-speculation, int4x2 KV; " in plan("--kv-format", "int4x2")[1]
    said = plan("--kv-format", "int8", "--draft-weights", "int4")[1]
    assert ", self-speculation, int8 KV, dense weights, drafts int4; " in said
