"""What may be copied soon is not drafted by a model first, so that throughput is highest in the long run."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from engine.control.auto import AutoGamma
from engine.control.drafting_model import DraftingModel
from engine.control.step_times import StepSample, StepTimes
from engine.control.text_outlook import Advance, TextOutlook
from engine.messages import AddRequest
from engine.ngram.ngram_drafts import NO_PROPOSAL, Proposal
from engine.params import SamplingParams
from engine.plan import RoundPlan, RoundResult, RowResult, RowWork
from engine.scheduler.controller import RowDrafts
from engine.scheduler.request import Request

MODEL_MAX, TEXT_MAX = 8, 12
CONTEXT = 2000

Choose = Callable[[Sequence[Proposal]], RowDrafts]


def times(proposed: int, model: int) -> tuple[float, float]:
    """Seconds of a round's draft steps, and of its verify pass."""
    return 25e-3 * model + (2e-3 * proposed if model else 0.0), 50e-3 + 4e-3 * (proposed + model)


class Copier:
    """A row that writes about `new` tokens, then copies about `copied` tokens of its text, and so on, and a model that
    is always right. The text is found from the first copied token on."""

    def __init__(self, new: int, copied: int) -> None:
        self._mean, self._rng = (new, copied), random.Random(0)
        self._stretch, self._left = 1, 0

    def _advance(self, tokens: int) -> None:
        while tokens >= self._left:
            tokens -= self._left
            self._stretch = 1 - self._stretch
            mean = self._mean[self._stretch]
            self._left = self._rng.randint((mean + 1) // 2, mean + mean // 2)
        self._left -= tokens

    @property
    def proposal(self) -> Proposal:
        self._advance(0)
        return Proposal([7] * min(self._left, TEXT_MAX), 8) if self._stretch else NO_PROPOSAL

    def run(self, rounds: int, choose: Choose, observe: Callable[[RowDrafts, Proposal, float, float], None]) -> float:
        """Return the tokens per second of so many rounds."""
        tokens, seconds = 0, 0.0
        for _ in range(rounds):
            proposal = self.proposal
            drafts = choose([proposal])
            assert drafts.proposed <= len(proposal.tokens)
            draft_s, verify_s = times(drafts.proposed, drafts.model)
            observe(drafts, proposal, draft_s, verify_s)
            made = drafts.proposed + drafts.model + 1
            self._advance(made)
            tokens, seconds = tokens + made, seconds + draft_s + verify_s
        return tokens / seconds


def controller() -> AutoGamma:
    samples = [
        StepSample(1, context, gamma, *times(*((0, gamma) if gamma <= MODEL_MAX else (gamma, 0))), 0, gamma > MODEL_MAX)
        for context in (100, CONTEXT)
        for gamma in (0, 1, 4, MODEL_MAX, TEXT_MAX)
    ]
    model = DraftingModel(StepTimes(samples, lambda context, budget: min(context, 512)), [0], 512)
    return AutoGamma([model], MODEL_MAX, TEXT_MAX)


def with_controller(copier: Copier, auto: AutoGamma, rounds: int) -> float:
    request = Request(AddRequest("a", [0] * CONTEXT, SamplingParams(max_tokens=10**6)), (), 0)

    def observe(drafts: RowDrafts, proposal: Proposal, draft_s: float, verify_s: float) -> None:
        gamma = drafts.proposed + drafts.model
        work = RowWork(0, CONTEXT - 1, 1, gamma, True, proposed=proposal.tokens[: drafts.proposed])
        # Of what was proposed, all is right, and nothing shows where it would have ended.
        tokens = [*proposal.tokens, *[8] * (gamma + 1)][: gamma + 1]
        result = RoundResult(0, [RowResult(gamma, gamma, tokens, None)], draft_s, verify_s)
        auto.observe(RoundPlan(0, [], [], [work]), [request], result)

    return copier.run(rounds, lambda proposals: auto.choose([request], 0, proposals)[0], observe)


def fixed(copier: Copier, model: int, rounds: int) -> float:
    """Tokens per second with all that is found in the text, and where nothing is, `model` drafts of the model."""

    def choose(proposals: Sequence[Proposal]) -> RowDrafts:
        found = len(proposals[0].tokens)
        return RowDrafts(found, 0) if found else RowDrafts(0, model)

    return copier.run(rounds, choose, lambda *_: None)


@pytest.mark.parametrize(("new", "copied"), [(1, 8), (2, 8), (2, 12), (3, 5), (10, 10), (40, 40), (30, 5)])
def test_copies_are_left_to_the_text(new: int, copied: int) -> None:
    """The number of drafts of the model where nothing is found depends on what follows. It is near the best one."""
    best = max(fixed(Copier(new, copied), model, 400) for model in range(MODEL_MAX + 1))
    copier, auto = Copier(new, copied), controller()
    with_controller(copier, auto, 100)
    assert with_controller(copier, auto, 400) >= 0.92 * best


def test_a_copy_that_ends_leaves_nothing_behind() -> None:
    """After a long copy, in which there were explorations, a model drafts new text as if there had been none."""
    auto, fresh = controller(), controller()
    with_controller(Copier(0, 10**6), auto, 600)
    assert auto._explorations > 10
    after, alone = (with_controller(Copier(10**6, 1), each, 20) for each in (auto, fresh))
    assert after >= 0.85 * alone


def test_worth() -> None:
    outlook, steps = TextOutlook(), np.arange(1, 5)
    start = outlook.worth(["a"], steps, 0.1)[0]
    assert (np.diff(start) < 0).all()
    assert outlook.worth(["a"], steps, 1.0).tolist() == [[1.0] * 4]  # a copy is no faster
    for _ in range(60):
        outlook.update([Advance("a", 9, 9, 10), Advance("b", 0, 0, 1), Advance("c", 1, 1, 2)])
        outlook.update([Advance("a", 0, 0, 1), Advance("b", 0, 0, 3), Advance("c", 0, 0, 1)])
    soon, never, single, unknown = outlook.worth(["a", "b", "c", "d"], steps, 0.1)
    assert 0.1 < soon[0] < 0.2
    assert never[-1] > 0.9
    assert single[-1] > 0.9
    assert soon[0] < unknown[0] < never[0]
    outlook.forget("a")
    assert outlook.worth(["a"], steps, 0.1).tolist() == [unknown.tolist()]


def test_copies_end_where_rounds_do() -> None:
    """A copy that was accepted whole ends if nothing of the next proposal is, or nothing is found; one that was cut has
    ended before."""
    outlook, steps = TextOutlook(), np.arange(1, 9)
    for _ in range(60):
        outlook.update([Advance("long", 3, 3, 4), Advance("short", 3, 3, 4), Advance("cut", 4, 3, 4)])
        outlook.update([Advance("long", 3, 3, 4), Advance("short", 3, 0, 1), Advance("cut", 3, 0, 1)])
        outlook.update([Advance(name, 0, 0, 1) for name in ("long", "short", "cut")])
    ends = [1 - row.records.stays.alpha(0.9, 0) for row in map(outlook._requests.__getitem__, ("long", "short", "cut"))]
    assert ends == pytest.approx([1 / 7, 1 / 4, 1 / 4], abs=0.02)
    long, short, _ = outlook.worth(["long", "short", "cut"], steps, 0.1)
    assert long[-1] < short[-1]


def test_short_copies_and_costly_ones_are_no_reason_to_wait() -> None:
    """A model drafts further where a copy soon ends, or takes many drafts for each token that is right."""
    outlook, steps = TextOutlook(), np.arange(1, 9)
    for _ in range(60):
        outlook.update([Advance("long", 9, 9, 10), Advance("short", 3, 2, 3), Advance("costly", 16, 2, 3)])
        outlook.update([Advance(name, 0, 0, 2) for name in ("long", "short", "costly")])
    long, short, costly = outlook.worth(["long", "short", "costly"], steps, 0.1)
    assert (long < short).all()
    assert (short < costly).all()
    assert long[-1] < 0.3
    assert costly[-1] > 0.7
    # As a chain of two states, at 16 / 2 times the share.
    exact = TextOutlook()
    for _ in range(400):
        exact.update([Advance("a", 16, 2, 3)])
        exact.update([Advance("a", 0, 0, 1)])
        exact.update([Advance("a", 0, 0, 3)])
    begin, end = 1 / 3, 1 / 3
    copied = begin / (begin + end) * (1 - (1 - begin - end) ** steps)
    assert exact.worth(["a"], steps, 0.05)[0] == pytest.approx(1 - copied * (1 - 8 * 0.05), abs=0.02)


def test_copies_that_begin_among_several_tokens() -> None:
    """On average, they begin halfway."""
    outlook = TextOutlook()
    for _ in range(200):
        outlook.update([Advance("a", 0, 0, 7)])
        outlook.update([Advance("a", 5, 5, 6)])
    assert outlook.worth(["a"], np.arange(1, 2), 0.0)[0, 0] == pytest.approx(3 / 4, abs=0.02)


def test_rows_that_are_gone() -> None:
    outlook = TextOutlook()
    outlook.update([Advance(str(i), 0, 0, 1) for i in range(20)])
    outlook.retain(["3"], beyond=30)
    assert len(outlook._requests) == 20
    outlook.retain(["3"], beyond=10)
    assert list(outlook._requests) == ["3"]


def decoding(**most: int | None) -> list[Request]:
    """Make rows with these largest numbers of drafts."""
    rows = [
        Request(AddRequest(name, [0] * CONTEXT, SamplingParams(max_tokens=10**6, max_draft_tokens=count)), (), row)
        for row, (name, count) in enumerate(most.items())
    ]
    for row in rows:
        row.tokens += [1, 1]
    return rows


def plain_round(auto: AutoGamma, rows: Sequence[Request], share: int | None = None) -> None:
    auto.choose(rows, share=share)
    work = [RowWork(row, CONTEXT + 1, 1, 0, True) for row in range(len(rows))]
    results = [RowResult(0, 0, [1], None)] * len(rows)
    auto.observe(RoundPlan(0, [], [], work), rows, RoundResult(0, results, 0.0, 0.05))


def test_rows_that_may_not_copy_do_not_wait_for_copies() -> None:
    auto, rows = controller(), decoding(a=0, b=None, c=1, d=2)
    plain_round(auto, rows, share=1)
    assert not auto._outlook._requests
    plain_round(auto, rows, share=2)
    assert list(auto._outlook._requests) == ["b", "d"]


def test_a_request_with_the_name_of_one_that_was_aborted() -> None:
    auto, rows = controller(), decoding(a=None, b=None)
    for _ in range(20):
        plain_round(auto, rows)
    waited, unknown = auto._outlook.worth(["a", "c"], np.arange(1, 5), 0.1).tolist()
    assert waited != unknown
    (request,) = decoding(a=None)
    request.tokens.pop()
    work = RowWork(0, CONTEXT - 1, 1, 0, True)
    auto.begin_round()
    auto.observe(RoundPlan(0, [], [], [work]), [request], RoundResult(0, [RowResult(0, 0, [1], None)], 0.0, 0.05))
    assert auto._outlook.worth(["a"], np.arange(1, 5), 0.1).tolist() == [unknown]


@pytest.mark.parametrize("share", [0, 1, 2])
def test_no_more_drafts_than_the_round_has_room_for(share: int) -> None:
    (row,) = decoding(a=None)
    copies, drafts = ([Proposal([7] * share, 8)] if share else [NO_PROPOSAL]), []
    for proposals in (copies, [NO_PROPOSAL]):
        (chosen,) = controller().choose([row], 0, proposals, share)
        drafts.append(chosen.proposed + chosen.model)
    assert max(drafts) <= share
    assert drafts[1] == share  # a model would draft more
