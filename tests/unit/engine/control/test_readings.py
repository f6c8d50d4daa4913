"""Rows choose what their drafts read: the pages that a policy has chosen, or the latest ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from engine.control.acceptance import AcceptanceEstimates, Judged, Reading
from engine.control.goodput import Batch, Flags, Floats
from engine.control.step_times import StepSample
from engine.messages import AddRequest
from engine.params import SamplingParams
from engine.plan import RoundPlan, RoundResult
from tests.support.engines import run, tiny_engine, tiny_model
from tests.support.loads import BUDGET, Load, Machine
from tests.support.profiles import is_all, only_in_all
from tests.support.workloads import prompt_of


def shares_of(load: Load, rounds: int) -> list[float]:
    """Run rounds. Returns the share of rounds in which each row read the latest pages."""
    load.latest.clear()
    load.run(rounds)
    return [sum(latest[row] for latest in load.latest) / rounds for row in range(len(load.rows))]


def test_rows_read_what_suits_them() -> None:
    """The chosen pages or the latest ones, each row by itself. When that changes, they follow: the other is tried now
    and then, for a percent of the time."""
    rows, rounds = (8, 1000) if is_all() else (4, 500)
    machine, pairs = Machine(drafts=0.3), [(0.9, 0.5), (0.5, 0.9)] * (rows // 2)
    load = Load(machine, [4000] * rows, [0.0] * rows, by_reading=pairs)
    load.run(400)
    shares = shares_of(load, rounds)
    assert 0 < min(shares[::2]) <= max(shares[::2]) < 0.1
    assert 0.9 < min(shares[1::2]) <= max(shares[1::2]) < 1
    alike = [Load(machine, [4000] * rows, [alpha] * rows) for alpha in (0.9, 0.5)]
    best, worst = (each.run(800) for each in alike)
    assert load.run(rounds) > best - 0.05 * (best - worst)
    assert load.controller.report.alpha == pytest.approx(0.9, abs=0.05)
    load.by_reading = pairs[::-1]
    load.run(4 * rounds)
    shares = shares_of(load, 500)
    assert min(shares[::2]) > 0.9
    assert max(shares[1::2]) < 0.1


@pytest.mark.parametrize("reading", [0, 1])
def test_drafts_begin_again_with_either_reading(reading: int) -> None:
    """Explorations while nothing is drafted take turns."""
    load = Load(Machine(drafts=0.3), [4000] * 4, [0.0] * 4, by_reading=[(0.1, 0.1)] * 4)
    load.run(1000 if is_all() else 400)
    assert load.share_off(200) > 0.9
    load.by_reading = [(0.1, 0.95) if reading else (0.95, 0.1)] * 4
    load.run(4000 if is_all() else 1500)
    assert load.share_off(200) < 0.1
    assert all((share > 0.9) == reading for share in shares_of(load, 200))


def test_rows_that_are_read_whole_have_no_choice() -> None:
    load = Load(Machine(drafts=0.3), [BUDGET] * 2, [0.0] * 2, by_reading=[(0.5, 0.9)] * 2)
    assert shares_of(load, 300) == [0, 0]


@pytest.mark.parametrize(
    ("kv", "gamma", "drafter", "reads"),
    [
        ({"policy": "verified", "latest": "auto"}, "auto", "self", True),
        ({"policy": "verified", "latest": "auto"}, "auto", "ngram", False),
        only_in_all({"policy": "verified"}, "auto", "self", False),
        ({"policy": "quest"}, "auto", "self", False),
        only_in_all({"policy": "window"}, "auto", "self", False),
        ({"policy": "verified", "latest": "auto"}, 3, "self", False),
    ],
)
def test_the_controller_of_an_engine(
    kv: dict[str, Any], gamma: int, drafter: str, reads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its choices reach the plan, with their rows."""
    samples = [StepSample(rows, 64, gamma, 1e-4 * gamma, 0.01) for rows in (1, 8) for gamma in (0, 1, 4)]
    monkeypatch.setattr("engine.worker.controllers.load_profile", lambda key: samples)
    kv = kv if kv["policy"] == "window" else {**kv, "budget": 16}
    engine = tiny_engine(tiny_model(), gamma=gamma, speculation={"kv": kv, "drafter": drafter, "gamma_max": 4})
    if reads:
        controller = engine._scheduler.controller
        monkeypatch.setattr(controller._goodput[None], "_alphas", odd_rows)  # type: ignore[attr-defined]
    plans: list[RoundPlan] = []
    execute = engine._worker.execute

    def recorded(plan: RoundPlan, meanwhile: Callable[[], None]) -> RoundResult:
        plans.append(plan)
        return execute(plan, meanwhile)

    monkeypatch.setattr(engine._worker, "execute", recorded)
    new = 40 if is_all() else 20
    run(engine, [AddRequest(str(i), prompt_of(60, i), SamplingParams(max_tokens=new)) for i in range(4)])
    drafting = [work for plan in plans for work in plan.work if work.model_drafts]
    assert {work.row % 2 == 1 for work in drafting if work.latest} == ({True} if reads else set())
    assert not reads or {work.row % 2 == 1 for work in drafting if not work.latest} == {False}


def odd_rows(batch: Batch, budget: int, worse: bool) -> tuple[Floats, Flags]:
    """Rows with an odd number read the latest pages, and draft more than others."""
    odd = np.array([(row.row or 0) % 2 == 1 for row in batch.rows])
    return np.where(odd, 0.95, 0.8), odd


def test_readings_are_remembered_apart() -> None:
    estimates = AcceptanceEstimates(512, 512)
    for _ in range(100):
        estimates.update(512, [Judged("a", 4000, 1, True), Judged("a", 4000, 9, True, latest=True)])
    chosen, latest = Reading(512), Reading(512, latest=True)
    for request in ("a", "new"):
        assert estimates.alphas([request], [4000], chosen) == [pytest.approx(0.5, abs=0.03)]
        assert estimates.alphas([request], [4000], latest) == [pytest.approx(0.9, abs=0.03)]
    assert estimates.mean(512) == pytest.approx((0.5 + 5 * 0.9) / 6, abs=0.05)  # twice and ten times judged
    estimates.forget("a")
    assert not estimates._requests
