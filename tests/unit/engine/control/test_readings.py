"""Rows choose what their drafts read: the pages that a policy has chosen, or the latest ones."""

from __future__ import annotations

import pytest

from engine.control.acceptance import AcceptanceEstimates, Judged, Reading
from tests.support.loads import Load, Machine


def test_rows_read_what_suits_them() -> None:
    """The chosen pages or the latest ones, each row by itself; what suits it less is tried now and then."""
    machine, pairs = Machine(drafts=0.3), [(0.9, 0.5), (0.5, 0.9)] * 4
    load = Load(machine, [4000] * 8, [0.0] * 8, by_reading=pairs)
    load.run(400)
    load.latest.clear()
    rate = load.run(400)
    shares = [sum(round_[row] for round_ in load.latest) / len(load.latest) for row in range(8)]
    assert max(shares[::2]) < 0.15
    assert min(shares[1::2]) > 0.85
    alike = [Load(machine, [4000] * 8, [alpha] * 8) for alpha in (0.9, 0.5)]
    best, worst = (each.run(800) for each in alike)
    assert rate > best - 0.15 * (best - worst)
    assert load.controller.report.alpha == pytest.approx(0.9, abs=0.05)


def test_readings_are_remembered_apart() -> None:
    estimates = AcceptanceEstimates(512, 512)
    for _ in range(100):
        estimates.update(512, [Judged("a", 4000, 1, True), Judged("a", 4000, 9, True, latest=True)])
    chosen, latest = Reading(512), Reading(512, latest=True)
    for request in ("a", "new"):
        assert estimates.alphas([request], [4000], chosen) == [pytest.approx(0.5, abs=0.03)]
        assert estimates.alphas([request], [4000], latest) == [pytest.approx(0.9, abs=0.03)]
    assert min(estimates.judged(chosen), estimates.judged(latest)) > 100
    estimates.forget("a")
    assert not estimates._requests
