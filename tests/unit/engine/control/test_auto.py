"""The gamma controller chooses the fastest option, adapts when that changes, and loses little by exploring."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.control.acceptance import AcceptanceEstimates, AcceptanceRecord, Judged, Reading
from engine.control.calibration import Calibration
from engine.control.step_times import StepSample, StepTimes
from engine.scheduler.controller import FixedGamma
from tests.support.loads import BUDGET, GAMMA_MAX, Load, Machine, reads
from tests.support.profiles import examples, is_all, only_in_all


def fixed(machine: Machine, contexts: list[int], alphas: list[float], gamma: int, rounds: int = 400) -> float:
    """Tokens per second with the same gamma in every round."""
    load = Load(machine, contexts, alphas)
    load.controller.choose = FixedGamma(gamma).choose  # type: ignore[method-assign]
    return load.run(rounds)


ROWS, CONTEXTS, ALPHAS = (1, 4, 16), (100, 2000, 8000, 30000), (0.3, 0.7, 0.9)


# `make test` has some acceptance rates and contexts, each with one number of rows.


@pytest.mark.parametrize(
    ("alpha", "context", "rows"),
    [
        (alpha, context, rows) if (i + j) % 3 == k and i < 2 + j else only_in_all(alpha, context, rows)
        for j, alpha in enumerate(ALPHAS)
        for i, context in enumerate(CONTEXTS)
        for k, rows in enumerate(ROWS)
    ],
)
def test_as_fast_as_the_best_fixed_gamma(rows: int, context: int, alpha: float) -> None:
    machine = Machine()
    contexts, alphas = [context] * rows, [alpha] * rows
    load = Load(machine, contexts, alphas)
    load.run(100)
    best = max(fixed(machine, contexts, alphas, gamma) for gamma in range(GAMMA_MAX + 1))
    assert load.run(400) > 0.94 * best  # the speed of 400 rounds varies by some percent with random acceptance


def test_off_where_it_loses_and_on_where_it_wins() -> None:
    short = Load(Machine(), [100] * 4, [0.8] * 4)
    short.run(300)
    assert short.share_off(200) > 0.9
    long = Load(Machine(), [20000] * 4, [0.8] * 4)
    long.run(300)
    assert long.share_off(200) < 0.1


def test_it_turns_on_again() -> None:
    """Drafting is off because the profile overestimates draft times; exploration corrects that."""
    load = Load(Machine(), [20000] * 4, [0.8] * 4, known=Machine(drafts=40.0))
    load.run(20)
    assert load.share_off(20) > 0.9
    load.run(3000 if is_all() else 1500)
    assert load.share_off(100) < 0.1


def test_it_turns_off_again() -> None:
    machine = Machine()
    load = Load(machine, [5000] * 4, [0.8] * 4)
    load.run(100)
    assert load.share_off(50) < 0.1
    load.alphas = [0.02] * 4
    load.run(300)
    assert load.share_off(100) > 0.9


def test_trying_costs_little() -> None:
    """Exploration on a load where drafting never pays costs at most 2 % of the speed of plain decoding."""
    machine = Machine()
    load = Load(machine, [100] * 4, [0.0] * 4)
    load.run(100)
    rounds = 2000 if is_all() else 1000
    assert load.run(rounds) > 0.98 * fixed(machine, [100] * 4, [0.0] * 4, 0)
    assert any(any(gammas) for gammas in load.chosen[-rounds:])


def test_a_slower_machine_changes_nothing() -> None:
    machine = Machine()
    load = Load(machine, [20000] * 4, [0.8] * 4)
    before = load.run(300)
    machine.slower = 3.0
    load.run(50)
    assert load.run(300) == pytest.approx(before / 3, rel=0.06)
    assert load.share_off(300) < 0.1


def test_rows_that_are_rarely_right_draft_less() -> None:
    load = Load(Machine(token=1e-3), [20000] * 8, [0.95] * 4 + [0.1] * 4)
    load.run(300)
    mean = [sum(gammas[i] for gammas in load.chosen[-100:]) / 100 for i in range(8)]
    assert min(mean[:4]) > max(mean[4:]) + 1


def test_limits_of_requests_are_kept() -> None:
    load = Load(Machine(), [20000] * 4, [0.9] * 4, limits=[0, 2, None, None])
    load.run(100)
    assert all(gammas[0] == 0 and gammas[1] <= 2 for gammas in load.chosen)
    assert max(gammas[2] for gammas in load.chosen) > 2


def test_reckoning() -> None:
    """The report's predicted gain from speculation equals the real gain."""
    machine = Machine()
    contexts, alphas = [20000] * 4, [0.8] * 4
    load = Load(machine, contexts, alphas)
    rate = load.run(400)
    report = load.controller.report
    plain = fixed(machine, contexts, alphas, 0)
    assert report.decode_seconds == pytest.approx(load.seconds)
    assert report.plain_seconds / report.decode_seconds == pytest.approx(rate / plain, rel=0.05)
    assert report.plain_seconds / report.forecast_seconds == pytest.approx(rate / plain, rel=0.1)
    assert report.alpha == pytest.approx(0.8, abs=0.05)


@given(
    rows=st.integers(1, 40),
    contexts=st.lists(st.integers(1, 100000), min_size=40, max_size=40),
    seed=st.integers(0, 99),
)
@examples(15, 60)
def test_any_batch_is_answered(rows: int, contexts: list[int], seed: int) -> None:
    rng = random.Random(seed)
    load = Load(Machine(), contexts[:rows], [rng.random() for _ in range(rows)], seed=seed)
    load.run(20)
    assert all(0 <= gamma <= GAMMA_MAX for gammas in load.chosen for gamma in gammas)


def test_ended_requests_are_forgotten() -> None:
    load = Load(Machine(), [20000] * 4, [0.8] * 4)
    load.run(50)
    acceptance = load.controller._goodput[None].model.acceptance
    assert len(acceptance._requests) == 4
    for row in load.rows:
        row.finish_reason = "stop"
    load.run(1)
    assert acceptance._requests == {}


def test_acceptance_is_the_truncated_geometric_estimate() -> None:
    record = AcceptanceRecord()
    record.add(3, 0, 1e9)  # all of 3 drafts accepted
    record.add(1, 1, 1e9)  # the second draft rejected; later ones were never judged
    assert record.alpha(0.0, 0.0) == pytest.approx(4 / 5)
    assert record.alpha(0.5, 5.0) == pytest.approx((4 + 2.5) / 10)


def test_step_times_are_lines_between_what_was_measured() -> None:
    machine = Machine()
    times = StepTimes(machine.samples(), reads)
    for rows, context, gamma in [(1, 64, 0), (16, 4096, 6), (4, 4096, 3), (2, 700, 2), (10, 9000, 1), (30, 100, 5)]:
        assert times.verify(rows, rows * context, [0, gamma]) == pytest.approx(
            [machine.verify([context] * rows, [each] * rows) for each in (0, gamma)]
        )
        expected = machine.draft([context] * rows, [1] * rows)
        assert times.draft(rows, times.read([context] * rows, 0)) == pytest.approx(expected)


def test_step_times_need_plain_steps_and_drafts() -> None:
    with pytest.raises(ValueError, match="plain steps"):
        StepTimes([StepSample(1, 64, 0, 0.0, 1.0)], lambda context, budget: context)
    with pytest.raises(ValueError, match="plain steps"):
        StepTimes([StepSample(1, 64, 2, 1.0, 1.0)], lambda context, budget: context)


def test_corrections_keep_kinds_comparable() -> None:
    calibration = Calibration()
    for _ in range(200):
        calibration.update("plain", 0, 2.0, 1.0)
    assert calibration.factor("plain", 0) == pytest.approx(2.0, rel=0.01)
    assert calibration.factor("draft", 0) > 1.2  # never measured, but scaled like other kinds on the same machine
    for _ in range(200):
        calibration.update("plain", 0, 2.0, 1.0)
        calibration.update("draft", 0, 4.0, 1.0)
    assert calibration.factor("draft", 0) / calibration.factor("plain", 0) == pytest.approx(2.0, rel=0.1)


@pytest.mark.parametrize(
    ("by_budget", "best"), [({512: 0.9, 256: 0.895, 128: 0.89}, 128), ({512: 0.95, 256: 0.6, 128: 0.4}, 512)]
)
def test_the_budget_that_pays(by_budget: dict[int, float], best: int) -> None:
    """The controller reduces the budget where reading is expensive and a smaller budget costs little acceptance;
    otherwise it keeps the largest."""
    machine = Machine(base=2e-3, kv=5e-6)
    load = Load(machine, [8000] * 8, [0.0] * 8, budgets=(512, 256, 128), by_budget=by_budget)
    load.run(1500 if is_all() else 600)
    budgets = []
    for _ in range(100):
        load.run(1)
        budgets.append(load.controller.way.budget)
    assert budgets.count(best) > 80


def test_a_budget_that_was_not_tried_is_taken_to_be_worse() -> None:
    estimates = AcceptanceEstimates(512, 512)
    for _ in range(100):
        estimates.update(512, [Judged("a", 4000, 9, True)])
    assert estimates.alpha(Reading(512)) == pytest.approx(0.9, abs=0.01)
    assert estimates.alpha(Reading(128)) == pytest.approx(0.8, abs=0.02)
    assert estimates.alphas(["new"], [4000], Reading(512)) == [pytest.approx(0.9, abs=0.01)]


@pytest.mark.parametrize("mixed", [only_in_all(False), True])
def test_trying_costs_what_it_may_also_among_prompts(mixed: bool) -> None:
    """Rounds that include prompts give no step times, but explorations in them are charged all the same."""
    machine = Machine()
    load = Load(machine, [100] * 4, [0.3] * 4, prompts=mixed)
    rounds = 2000 if is_all() else 1000
    load.run(rounds)
    plain = 4 / machine.verify([100] * 4, [0] * 4)
    assert load.run(rounds) > 0.98 * plain
    assert load.share_off(rounds) < 1.0


def test_rows_catch_up_where_that_pays() -> None:
    load = Load(Machine(), [20000] * 4, [0.8] * 4, lags=[20000] * 4, catch_up_s=0.02e-3)
    load.run(400)
    assert load.caught_up == pytest.approx(4 * 20000, rel=0.02)
    assert load.share_off(200) < 0.1
    never_late = Load(Machine(), [20000] * 4, [0.8] * 4)
    never_late.run(400)
    assert load.run(400) == pytest.approx(never_late.run(400), rel=0.05)


@pytest.mark.parametrize(("lag", "others"), [(20000, 0), (20000, 3)])
def test_rows_do_not_catch_up_where_that_costs_more_than_it_brings(lag: int, others: int) -> None:
    """A late row among drafting rows decodes plainly; catching up costs no more than the exploration allowance."""
    contexts, alphas = [20000] * (1 + others), [0.8] * (1 + others)
    load = Load(Machine(), contexts, alphas, lags=[lag] + [0] * others, catch_up_s=1e-3, max_tokens=2000)
    load.run(200)  # the controller learns the cost of catching up
    before = load.caught_up
    load.run(2000 if is_all() else 900)
    assert (load.caught_up - before) * 1e-3 < 0.03 * load.seconds
    if others:
        assert all(gammas[0] == 0 for gammas in load.chosen[-200:])
        assert load.share_off(200) < 0.1
    else:
        assert load.share_off(200) == 1.0


def test_trying_a_row_that_is_late_costs_what_trying_may() -> None:
    """Catching up with a long prompt takes many explorations and costs at most 2 % on a load where drafting never
    pays."""
    machine = Machine()
    load = Load(machine, [3000] * 4, [0.0] * 4, lags=[3000] * 4, catch_up_s=0.1e-3)
    load.run(100)
    plain = fixed(machine, [3000] * 4, [0.0] * 4, 0)
    rounds = 20000 if is_all() else 3000
    assert load.run(rounds) > 0.98 * plain
    assert load.caught_up > 3000
    assert any(any(gammas) for gammas in load.chosen[-rounds // 2 :])


def test_catching_up_teaches_nothing_about_drafts() -> None:
    load = Load(Machine(), [20000] * 4, [0.8] * 4, lags=[5000] * 4, catch_up_s=0.5e-3)
    factors = []
    for _ in range(200):
        load.run(1)
        factors.append(load.controller._calibration.factor("draft", (3, 17, BUDGET)))
    assert load.caught_up > 4 * 5000
    assert all(factor == pytest.approx(1.0, abs=0.05) for factor in factors)
    assert load.controller._catch_up.seconds(1000) == pytest.approx(0.5, rel=0.05)
