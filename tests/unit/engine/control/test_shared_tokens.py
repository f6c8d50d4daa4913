"""Tokens that rows share: their measured price, and what the controller makes of it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.control.auto import AutoGamma
from engine.control.drafting_model import DraftingModel
from engine.control.goodput import Batch, verify_bucket
from engine.control.step_times import StepSample, StepTimes
from engine.messages import AddRequest
from engine.params import SamplingParams
from engine.plan import RoundPlan, RoundResult, RowResult, RowWork
from engine.scheduler.controller import shared_in_part
from engine.scheduler.request import Request

BUDGET, GAMMA_MAX, CONTEXT = 512, 3, 8000
PRICES = {0: 0.25, 1: 0.5, 3: 0.75}
"""Price of a shared token, by gamma."""


def window(context: int, budget: int) -> int:
    return min(context, budget or BUDGET)


def everything(context: int, budget: int) -> int:
    return context


@dataclass
class SharingMachine:
    """A model of round times: a forward costs a base, a cost per query and a cost per effective KV token."""

    reads: Callable[[int, int], int] = window
    base: float = 10e-3
    query: float = 0.1e-3
    kv: float = 2e-6

    def forward(self, rows: int, queries: int, tokens: float, shared: float, price: float) -> float:
        return self.base + self.query * rows * queries + self.kv * (tokens - (1 - price) * shared)

    def verify(self, rows: int, context: int, gamma: int, shared: float) -> float:
        price = PRICES.get(gamma, 0.625)  # of gamma 2, halfway between 1 and 3
        return self.forward(rows, gamma + 1, rows * context, shared, price)

    def draft(self, rows: int, context: int, shared: float) -> float:
        read = self.reads(context, 0)
        return self.forward(rows, 1, rows * read, shared if read == context else 0.0, PRICES[0])

    def sample(self, rows: int, context: int, gamma: int, shared: int = 0) -> StepSample:
        drafting = gamma * self.draft(rows, context, shared)
        return StepSample(rows, context, gamma, drafting, self.verify(rows, context, gamma, shared), shared)

    def samples(self, shared: bool = True) -> list[StepSample]:
        own = [
            self.sample(rows, context, gamma) for rows in (1, 4, 16) for context in (64, 4096) for gamma in (0, 1, 3)
        ]
        if shared:
            own += [self.sample(rows, 4096, gamma, (rows - 1) * 4032) for rows in (4, 16) for gamma in (0, 1, 3)]
        return own


def requests(count: int, context: int = CONTEXT) -> list[Request]:
    params = SamplingParams(max_tokens=10**6)
    return [Request(AddRequest(str(i), [0] * context, params), (), i) for i in range(count)]


def drafts_after(machine: SharingMachine, rows: int, shared: int, rounds: int = 120, known: bool = True) -> float:
    """Run rounds at an acceptance of 0.8 and return the mean gamma of the last 100."""
    controller = AutoGamma([DraftingModel(StepTimes(machine.samples(known), machine.reads), (BUDGET,))], GAMMA_MAX)
    batch, rng, chosen = requests(rows), random.Random(0), []
    for _ in range(rounds):
        gammas = [drafts.model for drafts in controller.choose(batch, shared)]
        results = []
        for gamma in gammas:
            accepted = 0
            while accepted < gamma and rng.random() < 0.8:
                accepted += 1
            results.append(RowResult(gamma, accepted, [0] * (accepted + 1), None))
        steps = [sum(gamma > step for gamma in gammas) for step in range(max(gammas))]
        drafting = sum(machine.draft(count, CONTEXT, shared * (count - 1) / (rows - 1)) for count in steps)
        verifying = machine.verify(rows, CONTEXT, max(gammas), shared)
        work = [RowWork(i, CONTEXT - 1, 1, gamma, True) for i, gamma in enumerate(gammas)]
        plan = RoundPlan(0, [], [], work, controller.way.budget)
        controller.observe(plan, batch, RoundResult(0, results, drafting, verifying))
        chosen.append(sum(gammas) / rows)
    return sum(chosen[-100:]) / 100


@pytest.mark.parametrize("rows", [2, 4, 10, 16, 30])
@pytest.mark.parametrize("gamma", [0, 1, 2, 3])
@pytest.mark.parametrize("part", [0.0, 0.5, 1.0])
def test_shared_tokens_cost_their_price(rows: int, gamma: int, part: float) -> None:
    machine = SharingMachine()
    times = StepTimes(machine.samples(), window)
    shared = part * (rows - 1) * CONTEXT
    assert times.shared_price(rows, gamma) == pytest.approx({**PRICES, 2: 0.625}[gamma])
    assert times.verify(rows, rows * CONTEXT, [gamma], shared) == [
        pytest.approx(machine.verify(rows, CONTEXT, gamma, shared))
    ]
    effective = times.effective_tokens(rows, rows * CONTEXT, shared, gamma)
    assert times.verify(rows, effective, [gamma]) == pytest.approx(times.verify(rows, rows * CONTEXT, [gamma], shared))


def test_prices_of_some_rows_hold_between_and_beyond() -> None:
    machine = SharingMachine()
    samples = machine.samples(shared=False)
    for rows, cost in ((4, 0.5), (16, 0.2)):  # the price falls with rows
        seconds = machine.forward(rows, 1, rows * 4096, (rows - 1) * 4096, cost)
        samples.append(StepSample(rows, 4096, 0, 0.0, seconds, (rows - 1) * 4096))
    times = StepTimes(samples, window)
    assert [times.shared_price(rows, 0) for rows in (2, 4, 10, 16, 99)] == pytest.approx([0.5, 0.5, 0.35, 0.2, 0.2])
    assert times.shared_price(4, 1) == 1.0  # not measured with drafts


def test_without_a_measured_price_nothing_is_gained() -> None:
    machine = SharingMachine()
    times = StepTimes(machine.samples(shared=False), everything)
    assert times.shared_price(4, 0) is None
    assert times.effective_tokens(4, 4000, 3000, 0) == 4000
    assert times.verify(4, 4000, [0, 3], 3000) == times.verify(4, 4000, [0, 3])
    assert times.draft(4, 1000, 3000) == times.draft(4, 1000)


@pytest.mark.parametrize(("saved", "price"), [(-1e-3, 1.0), (1.0, 0.0)])
def test_noise_gives_no_impossible_price(saved: float, price: float) -> None:
    machine = SharingMachine()
    own = machine.sample(4, 4096, 0)
    sharing = StepSample(4, 4096, 0, 0.0, own.verify_s - saved, 3 * 4096)
    assert StepTimes([*machine.samples(shared=False), sharing], window).shared_price(4, 0) == price


def test_one_context_gives_no_price() -> None:
    """Without the cost of an own token there is nothing to compare with."""
    machine = SharingMachine()
    samples = [machine.sample(4, 4096, gamma) for gamma in (0, 3)] + [machine.sample(4, 4096, 0, 3 * 4096)]
    assert StepTimes(samples, window).shared_price(4, 0) is None


def test_rows_that_share_are_no_profile_alone() -> None:
    machine = SharingMachine()
    samples = [machine.sample(4, 4096, 0), machine.sample(4, 4096, 3, 3 * 4096)]
    with pytest.raises(ValueError, match="at least one gamma"):
        StepTimes(samples, window)


def test_drafts_that_read_everything_share() -> None:
    machine = SharingMachine(reads=everything)
    times, contexts = StepTimes(machine.samples(), everything), [CONTEXT] * 4
    shared = 3 * CONTEXT
    assert times.draft_shared(contexts, 0, shared) == shared
    assert times.draft(4, CONTEXT, shared) == pytest.approx(machine.draft(4, CONTEXT, shared))
    batch = Batch.from_requests(requests(4), GAMMA_MAX, shared)
    for rows in (1, 2, 4):
        expected = machine.draft(rows, CONTEXT, (rows - 1) * CONTEXT)
        assert batch.draft_seconds(times, 0, rows) == pytest.approx(expected)


def test_windows_share_nothing() -> None:
    """Rows of the profile have the same window only because they are equally long: that gives no price."""
    machine = SharingMachine()
    samples = [
        StepSample(s.rows, s.context, s.gamma, s.draft_s / 2, s.verify_s, s.shared) if s.shared else s
        for s in machine.samples()
    ]
    times = StepTimes(samples, window)
    assert times.draft_shared([CONTEXT] * 4, 0, 3 * CONTEXT) == 0
    assert times.draft_shared([400, 400, CONTEXT], 0, 300) > 0  # windows that cover their contexts
    batch = Batch.from_requests(requests(4), GAMMA_MAX, 3 * CONTEXT)
    assert batch.draft_seconds(times, 0, 4) == pytest.approx(machine.draft(4, CONTEXT, 0))
    assert times.draft(4, 100, 300) == times.draft(4, 100)


def test_drafting_stops_where_sharing_takes_what_it_saves() -> None:
    machine = SharingMachine()
    rows = 16
    assert drafts_after(machine, rows, 0) > 2
    assert drafts_after(machine, rows, (rows - 1) * CONTEXT) < 0.5
    assert drafts_after(machine, rows, (rows - 1) * 500) > 2


def test_drafting_goes_on_without_a_price() -> None:
    """The first choice is that of a batch that shares nothing; the times of rounds correct it as they do any other."""
    machine = SharingMachine()
    rows = requests(16)
    model = DraftingModel(StepTimes(machine.samples(shared=False), window), (BUDGET,))
    first = [AutoGamma([model], GAMMA_MAX).choose(rows, shared) for shared in (0, 15 * CONTEXT)]
    assert first[0] == first[1]
    assert any(first[0])


def test_drafts_that_list_pages_by_layer_share_none() -> None:
    """Their time is that of rows that share nothing."""
    machine = SharingMachine()
    contexts, shared = [CONTEXT] * 4, 3 * CONTEXT
    sharing, apart = (StepTimes(machine.samples(), everything, drafts_share=share) for share in (True, False))
    assert sharing.draft_shared(contexts, 0, shared) == shared
    assert apart.draft_shared(contexts, 0, shared) == 0
    assert apart.draft(4, CONTEXT, shared) == apart.draft(4, CONTEXT)


def test_calibration_is_by_effective_tokens() -> None:
    times = StepTimes(SharingMachine().samples(), window)
    shared = 15 * CONTEXT
    sharing = Batch.from_requests(requests(16), GAMMA_MAX, shared)
    for gamma, price in PRICES.items():
        effective = int(16 * CONTEXT - (1 - price) * shared)
        assert verify_bucket(sharing, times, gamma) == (5, effective.bit_length(), gamma)
    apart = Batch.from_requests(requests(16), GAMMA_MAX, 0)
    assert verify_bucket(apart, times, 0) == (5, (16 * CONTEXT).bit_length(), 0)
    assert verify_bucket(sharing.limited(sharing.limits), times, 0) == verify_bucket(sharing, times, 0)


@given(st.lists(st.integers(1, 10000), min_size=1, max_size=20), st.data())
def test_a_part_shares_no_more_than_all(contexts: list[int], data: st.DataObject) -> None:
    shared = data.draw(st.integers(0, sum(contexts) - max(contexts)))
    part = contexts[: data.draw(st.integers(0, len(contexts)))]
    found = shared_in_part(shared, contexts, part)
    assert 0 <= found <= min(shared, sum(part)) * (1 + 1e-9)
    if part == contexts and len(part) > 1:
        assert found == pytest.approx(shared)


@given(st.integers(2, 40), st.integers(1, 9999), st.data())
def test_a_part_of_equal_rows(rows: int, prefix: int, data: st.DataObject) -> None:
    part = data.draw(st.integers(1, rows))
    found = shared_in_part((rows - 1) * prefix, [10000] * rows, [10000] * part)
    assert found == pytest.approx((part - 1) * prefix)


@pytest.mark.parametrize("seed", range(20))
def test_noise_does_not_grow_beyond_what_was_measured(seed: int) -> None:
    """A profile of one and four short rows, each time 5 % off, predicts sixteen long ones within 25 %."""
    rng = random.Random(seed)

    def verify(rows: int, tokens: int, gamma: int) -> float:
        return 25e-3 + 2e-3 * rows * (gamma + 1) + 4e-6 * tokens * (1 + 0.1 * gamma)

    samples = [
        StepSample(rows, context, gamma, 9e-3 * gamma, verify(rows, rows * context, gamma) * rng.uniform(0.95, 1.05))
        for rows, contexts in ((1, (64, 8000)), (4, (128, 2048)))
        for context in contexts
        for gamma in (0, 1, 3)
    ]
    times = StepTimes(samples, lambda context, budget: min(context, 512))
    for gamma, found in enumerate(times.verify(16, 120_000, range(4))):
        assert found == pytest.approx(verify(16, 120_000, gamma), rel=0.25)
