"""The cost model against published measurements, within the errors that docs/benchmarks.md states."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bench.paper import published
from models.known_shapes import SHAPES
from planner.cost_model import SpeculationCost
from planner.expected_acceptance import DRAFT_MODEL
from planner.hardware import Device
from planner.placed_model import PUBLISHED, REFERENCE_ON_CPU, PlacedModel
from tests.support.paths import ROOT
from tests.support.profiles import whole_test_only_in_all

ROWS = published.read_rows()
FITTED = [row for row in ROWS if row.fit]


def test_the_table_is_whole() -> None:
    assert len(FITTED) == 11
    assert {row.gpu for row in FITTED} == {"a100-80gb"}
    assert {row.gpu for row in ROWS if not row.fit} == {"h100"}


def errors_of(rows: list[published.Row], constants: published.Constants) -> list[float]:
    return [abs(row.predict(constants) / row.speedup - 1) for row in rows]


def test_defaults_are_the_fit() -> None:
    constants = published.fit(FITTED)
    assert constants.layer_s == pytest.approx(PUBLISHED.layer_s, rel=0.01)
    assert constants.draft_model == pytest.approx(DRAFT_MODEL, abs=0.01)


def test_fitted_rows() -> None:
    errors = errors_of(FITTED, published.Constants())
    assert max(errors) < 0.15
    assert sum(errors) / len(errors) < 0.06


@whole_test_only_in_all
def test_rows_left_out() -> None:
    predictions = published.left_out(FITTED)
    errors = [abs(value / row.speedup - 1) for row, value in zip(FITTED, predictions, strict=True)]
    assert max(errors) < 0.15
    assert sum(errors) / len(errors) < 0.07


def test_a_gpu_that_was_never_fitted() -> None:
    errors = errors_of([row for row in ROWS if not row.fit], published.Constants())
    assert max(errors) < 0.10
    assert sum(errors) / len(errors) < 0.07


def test_step_times_that_were_never_fitted() -> None:
    steps = published.read_steps()
    errors = [abs(step.predict(published.Constants()) / step.milliseconds - 1) for step in steps]
    assert max(errors) < 0.16
    assert sum(errors) / len(errors) < 0.06


def test_weights_of_four_bits() -> None:
    """MARLIN: near the ratio of bytes up to 16 to 32 rows, and less and less at 64 to 128."""
    products = published.read_products()
    assert [product.rows for product in products] == [1, 16]
    for product in products:
        assert product.predict() == pytest.approx(product.speedup, rel=0.01)
    gains = [products[0].predict(rows) for rows in (32, 64, 128)]
    assert gains[0] == pytest.approx(3.87, rel=0.01)
    assert gains[0] > gains[1] > gains[2] > 1.1


def test_data_sheets_alone_promise_too_much() -> None:
    errors = [published.roofline(row) / row.speedup - 1 for row in FITTED]
    assert min(errors) > 0.2


@whole_test_only_in_all
def test_it_runs() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.paper.published"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.count("| 8 × ") == len(ROWS) + len(published.read_steps())
    assert "fitted rows: mean" in done.stdout


def test_our_own_cpu_table() -> None:
    """The CPU table of docs/benchmarks.md: batch 8, context 4000, sequential reads at 47.8 GB/s."""
    cpu = Device(name="cpu", flops=67e9, bandwidth=47.8e9, memory=24e9, link=24e9, all_reduce_s=3e-5)
    target = PlacedModel(model=SHAPES["smollm2-135m"], device=cpu, ranks=1, efficiency=REFERENCE_ON_CPU)
    speculation = SpeculationCost(target=target, draft=target, budget=512)
    measured = {1: (1.0, 1.39), 2: (1.0, 1.85), 3: (0.995, 2.05), 4: (0.996, 2.15)}
    for gamma, (alpha, speed) in measured.items():
        assert speculation.speedup(8, 4000, gamma, alpha) == pytest.approx(speed, rel=0.15)
