"""The controller chooses between a draft model and the target's own drafts, and between both and none."""

from __future__ import annotations

import pytest

from engine.control.auto import AutoGamma
from engine.control.drafting_model import DraftingModel
from engine.control.goodput import Batch, Goodput, Options
from engine.control.step_times import StepTimes
from engine.messages import AddRequest
from engine.ngram.ngram_drafts import Proposal
from engine.params import SamplingParams
from engine.plan import RoundPlan, RoundResult, RowResult, RowWork
from engine.scheduler.request import Request
from tests.support.loads import Load, Machine
from tests.support.profiles import is_all

ROUNDS = 1500 if is_all() else 500
TARGET = Machine(base=20e-3, kv=2e-6)
CHEAP, DEAR = Machine(base=20e-3, kv=2e-6, drafts=0.1), Machine(base=20e-3, kv=2e-6, drafts=0.6)


def load_of(drafting: Machine, alpha: float, own: Machine, own_alpha: float, **fields: object) -> Load:
    """Rows under a controller with a draft model and the target, each with its draft times and its acceptance."""
    return Load(drafting, [8000] * 4, [alpha] * 4, own=(own, own_alpha), **fields)  # type: ignore[arg-type]


def rate_alone(drafting: Machine, alpha: float) -> float:
    load = Load(drafting, [8000] * 4, [alpha] * 4)
    load.run(ROUNDS)
    return load.run(200)


@pytest.mark.parametrize(
    ("model", "own", "wanted"),
    [
        ((CHEAP, 0.9), (DEAR, 0.9), None),  # as good, and cheaper
        ((DEAR, 0.9), (CHEAP, 0.9), "self"),
        ((CHEAP, 0.3), (CHEAP, 0.9), "self"),  # as cheap, and better
        ((CHEAP, 0.9), (CHEAP, 0.3), None),
        ((CHEAP, 0.2), (DEAR, 0.98), "self"),  # dearer, but so much better
    ],
)
def test_the_better_model_drafts(model: tuple[Machine, float], own: tuple[Machine, float], wanted: str | None) -> None:
    """It is found, whichever of them it is, and hardly anything is lost to the other."""
    load = load_of(*model, *own)
    load.run(ROUNDS)
    rate = load.run(200)
    drafting = [way for way, gammas in zip(load.ways[-200:], load.chosen[-200:], strict=True) if any(gammas)]
    assert drafting.count(wanted) > 0.9 * len(drafting)  # type: ignore[arg-type]
    assert rate > 0.95 * max(rate_alone(*model), rate_alone(*own))


def test_neither_drafts_where_none_pays() -> None:
    load = load_of(DEAR, 0.1, DEAR, 0.1)
    load.run(ROUNDS)
    assert load.share_off(200) > 0.9


@pytest.mark.parametrize(("model", "own"), [(0.9, 0.5), (0.5, 0.9)])
def test_a_change_is_noticed(model: float, own: float) -> None:
    load = load_of(CHEAP, model, CHEAP, own)
    load.run(ROUNDS)
    before = load.ways[-100:].count("self")
    load.alphas, load.own = [own] * 4, (CHEAP, model)
    load.run(2 * ROUNDS)
    after = load.ways[-100:].count("self")
    assert (before > 85, after > 85) == (own > model, model > own)


@pytest.mark.parametrize(("seconds", "drafts"), [(1e-6, True), (50e-3, False)])
def test_catching_up_is_weighed_against_the_target_s_own_drafts(seconds: float, drafts: bool) -> None:
    """A draft model that lacks long contexts is slightly better than the target. It drafts only if the contexts take
    less time than it saves."""
    load = load_of(CHEAP, 0.9, CHEAP, 0.8, lags=[8000] * 4, catch_up_s=seconds, max_tokens=300)
    load.run(ROUNDS)
    assert (load.ways[-100:].count(None) > 80) == drafts
    if not drafts:
        assert load.run(200) > 0.95 * rate_alone(CHEAP, 0.8)


def test_a_model_that_lags_costs_no_time_while_text_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """All ways are equal where all drafts come from the text. They are not compared in each round."""
    calls: list[int] = []
    options = Goodput.options

    def counted(goodput: Goodput, batch: Batch, budget: int, **kinds: bool) -> Options:
        calls.append(budget)
        return options(goodput, batch, budget, **kinds)

    monkeypatch.setattr(Goodput, "options", counted)
    samples = [*CHEAP.samples(), *DEAR.samples("self")]
    models = [
        DraftingModel(StepTimes(samples, lambda context, budget: min(context, budget)), (512, 256), 512),
        DraftingModel(
            StepTimes(samples, lambda context, budget: min(context, budget), drafter="self"),
            (512, 256),
            512,
            name="self",
        ),
    ]
    controller = AutoGamma(models, 6, 12)
    request = Request(AddRequest("a", [0] * 8000, SamplingParams(max_tokens=10**6)), (), 0)
    request.tokens += [0, 0]
    for number in range(60):
        request.draft_lag = 500
        if number == 40:
            calls.clear()
        (drafts,) = controller.choose([request], 0, [Proposal([7] * 12, 9)])
        work = RowWork(0, 7999, 1, drafts.proposed + drafts.model, True, proposed=[7] * drafts.proposed)
        tokens = [7] * (work.gamma + 1)
        result = RoundResult(number, [RowResult(work.gamma, work.gamma, tokens, None)], 0.0, 30e-3)
        controller.observe(RoundPlan(number, [], [], [work], *controller.way), [request], result)
    assert drafts.proposed == 12
    assert len(calls) < 60
    # Where text is new again, the model drafts, if it catches up fast.
    for _ in range(2):
        assert controller.choose([request])[0].model > 0
        assert controller.way.drafter is None
