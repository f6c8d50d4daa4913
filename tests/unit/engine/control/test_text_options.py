"""Rows take the better way to draft: near the best of all choices, and as acceptance turns out."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.control.auto import AutoGamma
from engine.control.drafting_model import DraftingModel
from engine.control.step_times import StepSample, StepTimes
from engine.control.text_acceptance import JudgedProposal, TextAcceptance, TextAlpha
from engine.control.text_options import DraftStep, TextChooser
from engine.messages import AddRequest
from engine.ngram.ngram_drafts import NO_PROPOSAL, Proposal
from engine.params import SamplingParams
from engine.plan import RoundPlan, RoundResult, RowResult, RowWork
from engine.scheduler.request import Request
from tests.support.profiles import examples

MODEL_MAX, TEXT_MAX = 3, 6


def rows_of(count: int, context: int = 500) -> list[Request]:
    return [Request(AddRequest(str(i), [0] * context, SamplingParams(max_tokens=10**6)), (), i) for i in range(count)]


@dataclass
class Rows:
    rows: Sequence[Request]
    proposals: Sequence[Proposal]
    limits: np.ndarray


class Known(TextAcceptance):
    """Estimates that are known."""

    def __init__(self, betas: list[TextAlpha]) -> None:
        super().__init__()
        self._betas = betas

    def alphas(self, requests: object, matches: object) -> list[TextAlpha]:
        return self._betas


def survival(beta: TextAlpha, step: int) -> float:
    return beta.first * beta.later ** (step - 1) if step else 1.0


PROBABILITIES = st.sampled_from([0.05, 0.3, 0.6, 0.8, 0.95])


@given(
    st.lists(
        st.tuples(PROBABILITIES, st.builds(TextAlpha, PROBABILITIES, PROBABILITIES), st.integers(0, TEXT_MAX)),
        min_size=1,
        max_size=2,
    ),
    st.floats(0.01, 0.3),
    st.sampled_from([DraftStep(), DraftStep(0.1, 0.02, 0.02), DraftStep(0.3, 0.1, 0.1), DraftStep(0.6, 0.2, 0.05)]),
    st.sampled_from([1.0, 0.95, 0.7, 0.3]),
)
@examples(60, 600)
def test_near_the_best_choice(
    rows: list[tuple[float, TextAlpha, int]], slope: float, step: DraftStep, kept: float
) -> None:
    """rows: acceptance of a model's drafts and of the text's, and length of the proposal. slope: of a verify pass over
    drafts, relative to a plain step. kept: what each further draft of a model is worth of the one before it."""
    count = len(rows)
    verify = [1 + slope * gamma for gamma in range(max(MODEL_MAX, TEXT_MAX) + 1)]
    alphas, betas = np.array([row[0] for row in rows]), [row[1] for row in rows]
    models = MODEL_MAX if step.first_row else 0  # without a model that drafts

    def rate(choice: tuple[tuple[int, int], ...], kept: float = kept) -> float:
        tokens = float(count)
        for (p, j), (a, b, _) in zip(choice, rows, strict=True):
            of_model = sum((a * kept) ** s for s in range(1, j + 1))
            tokens += sum(survival(b, s) for s in range(1, p + 1)) + survival(b, p) * of_model
        steps = max(j for _, j in choice)
        further, queries = sum(j for _, j in choice) - steps, sum(p for p, j in choice if j)
        drafts = sum(p + j for p, j in choice) / count
        seconds = float(np.interp(drafts, range(len(verify)), verify))
        seconds += steps * step.first_row + further * step.further_row + queries * step.query
        return tokens / seconds

    ways = [
        [(p, j) for p in range(length + 1) for j in range(models + 1) if not (p and j and p + j > MODEL_MAX)]
        for _, _, length in rows
    ]
    best = max(map(rate, product(*ways)))
    proposals = [Proposal([0] * length, 4) if length else NO_PROPOSAL for _, _, length in rows]
    batch = Rows(rows_of(count), proposals, np.full(count, models))
    options = TextChooser(Known(betas), TEXT_MAX, models)
    plain = np.array([rate(((0, min(gamma, models)),) * count) for gamma in range(models + 1)])
    worth = np.array([[kept**s for s in range(1, TEXT_MAX + 1)]] * count)
    choice = options.choose(batch, verify, step, alphas if models else np.zeros(count), worth, plain)
    for index in range(len(plain)):
        made = tuple(zip(choice.proposed[index].tolist(), choice.drafts[index].tolist(), strict=True))
        assert choice.rates[index] == pytest.approx(rate(made))
        assert choice.tokens[index] / choice.seconds[index] == pytest.approx(rate(made, 1.0))
        assert max(j for _, j in made) <= index
        assert all(p <= len(proposal.tokens) for (p, _), proposal in zip(made, proposals, strict=True))
        assert all(p + j <= MODEL_MAX for p, j in made if p and j)
    assert max(choice.rates.max(), plain.max()) >= 0.93 * best


@pytest.mark.parametrize("beta", [0.5, 0.7, 0.9])
@pytest.mark.parametrize(
    "verify",
    [
        [1.0] + [1.6 + 0.01 * gamma for gamma in range(TEXT_MAX)],  # the first draft changes the kernel
        [1 + max(0.005 * gamma, 0.25 * (gamma - 3)) for gamma in range(TEXT_MAX + 1)],  # a few are bound by memory
    ],
)
def test_verify_times_that_are_no_line(verify: list[float], beta: float) -> None:
    best = max((1 + sum(beta**s for s in range(1, p + 1))) / verify[p] for p in range(TEXT_MAX + 1))
    batch = Rows(rows_of(1), [Proposal([0] * TEXT_MAX, 8)], np.zeros(1, dtype=np.int64))
    choice = TextChooser(Known([TextAlpha(beta, beta)]), TEXT_MAX, 0).choose(
        batch, verify, DraftStep(), np.zeros(1), np.ones((1, 1)), np.array([1.0])
    )
    assert max(1.0, choice.rates[0]) >= 0.95 * best


def samples(model: bool) -> list[StepSample]:
    """Times of a machine on which a draft step takes a third of a plain step."""
    found = []
    for rows in (1, 4):
        for context in (64, 4096):
            for gamma in (0, 1, 3, 6):
                verify = 30e-3 + 1e-3 * rows * (gamma + 1) + 1e-6 * rows * context
                from_text = gamma == 6 or not model
                found.append(
                    StepSample(rows, context, gamma, 0.0 if from_text else 10e-3 * gamma, verify, 0, from_text)
                )
    return found


@pytest.mark.parametrize("model", [False, True])
@pytest.mark.parametrize(("beta", "text"), [(0.95, True), (0.02, False)])
def test_what_pays_is_found(model: bool, beta: float, text: bool) -> None:
    """Text that is copied is drafted from the text, and text that is not soon is no more, whatever its matches say."""
    times = StepTimes(samples(model), lambda context, budget: min(context, 512))
    controller = AutoGamma([DraftingModel(times, [0], 512)], 3 if model else 0, 6)
    assert controller.gamma_max == 6
    rows, rng = rows_of(2), random.Random(0)
    chosen: list[int] = []
    for number in range(200):
        proposals = [Proposal([0] * 6, 8), NO_PROPOSAL]
        drafts = controller.choose(rows, 0, proposals)
        work, results = [], []
        for i, each in enumerate(drafts):
            proposed, accepted = [0] * each.proposed, 0
            while accepted < each.proposed and rng.random() < beta:
                accepted += 1
            gamma = each.proposed + each.model
            if accepted == each.proposed:
                while accepted < gamma and rng.random() < 0.7:
                    accepted += 1
            work.append(RowWork(i, 499, 1, gamma, True, proposed=proposed))
            # The text's tokens are all 0, and the target's another one where they are not accepted.
            tokens = [0] * min(accepted, each.proposed) + [1] * max(0, accepted - each.proposed)
            results.append(RowResult(gamma, accepted, [*tokens, 0 if rng.random() < beta else 1], None))
        assert drafts[1].proposed == 0
        chosen.append(drafts[0].proposed)
        steps = max(each.model_drafts for each in work)
        total = sum(each.gamma for each in work)
        result = RoundResult(number, results, 10e-3 * steps, 30e-3 + 1e-3 * (2 + total) + 1e-6 * 1000)
        controller.observe(RoundPlan(number, [], [], work), rows, result)
    late = sum(chosen[-100:]) / 100
    assert late > 4 if text else late < 1.5


def test_estimates_follow_a_request() -> None:
    estimates = TextAcceptance()
    start = estimates.alphas(["a", "b"], [2, 20])
    assert start[0] < start[1]
    for _ in range(40):
        estimates.update([JudgedProposal("a", 2, 6, False), JudgedProposal("b", 20, 0, True)])
    copies, invents = estimates.alphas(["a", "b"], [2, 20])
    assert min(copies) > 0.9
    assert invents.first < 0.2
    assert invents.later == start[1].later  # never judged
    # Another request starts from what others had, and a length of match has an estimate of its own.
    assert start[0].first + 0.1 < estimates.alphas(["c"], [2])[0].first < copies.first
    assert estimates.alphas(["a"], [8])[0] == TextAcceptance().alphas(["a"], [8])[0]
    estimates.forget("a")
    assert estimates.alphas(["a"], [2]) == estimates.alphas(["c"], [2])


def test_the_first_token_is_judged_apart() -> None:
    """Half of the proposals fail at once, and the others hold for long."""
    estimates = TextAcceptance()
    for _ in range(60):
        estimates.update([JudgedProposal("a", 8, 10, True), JudgedProposal("a", 8, 0, True)])
    first, later = estimates.alphas(["a"], [8])[0]
    assert first == pytest.approx(0.5, abs=0.1)
    assert later == pytest.approx(0.9, abs=0.05)


def test_proposals_that_are_not_drafted_are_judged() -> None:
    times = StepTimes(samples(True), lambda context, budget: min(context, 512))
    controller = AutoGamma([DraftingModel(times, [0], 512)], 3, 6)
    before = controller._text.alphas(["0"], [8])[0]
    for number in range(20):
        controller.choose(rows_of(1), 0, [Proposal([5, 6, 7, 8], 8)])
        work = [RowWork(0, 499, 1, 0, True)]
        result = RoundResult(number, [RowResult(0, 0, [5], None)], 0.0, 30e-3)
        controller.observe(RoundPlan(number, [], [], work), rows_of(1), result)
    after = controller._text.alphas(["0"], [8])[0]
    assert after.first > before.first
    assert after.later == before.later


def test_a_request_that_did_not_pay_is_tried_again() -> None:
    """Without new drafts its record fades, back to what holds for all."""
    estimates = TextAcceptance()
    for _ in range(100):
        estimates.update([JudgedProposal("others", 8, 6, False)])
    estimates.update([JudgedProposal("a", 8, 0, True)] * 30)
    low = estimates.alphas(["a"], [8])[0].first
    for _ in range(300):
        estimates.fade(["a"])
    assert low < 0.4
    assert estimates.alphas(["a"], [8])[0].first > 0.7


def test_a_kind_of_match_that_did_not_pay_is_tried_again() -> None:
    estimates = TextAcceptance()
    start = estimates.alphas(["a"], [8])[0].first
    for _ in range(100):
        estimates.update([JudgedProposal("others", 8, 0, True)] * 5)
    low = estimates.alphas(["a"], [8])[0].first
    for _ in range(3000):
        estimates.fade([])
    assert low < 0.6 * start
    assert estimates.alphas(["a"], [8])[0].first > 0.85 * start


def test_records_of_requests_that_are_gone() -> None:
    estimates = TextAcceptance()
    estimates.update([JudgedProposal(str(i), 4, 1, False) for i in range(20)])
    estimates.retain(["3"], beyond=30)
    assert len(estimates._requests) == 20
    estimates.retain(["3"], beyond=10)
    assert list(estimates._requests) == ["3"]
