"""A draft model and the target itself draft by turns, beside the text: nothing changes the output. In float64, on tiny
random models."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from torch import Tensor

from engine.batch.runner import Runner
from engine.config.deployment import EngineConfig
from engine.config.speculation import SpeculationConfig
from engine.control.step_times import StepSample
from engine.core import Engine
from engine.messages import AddRequest
from engine.params import SamplingParams
from engine.scheduler.controller import Way
from engine.worker.resolve import resolve
from models.batch import ForwardBatch
from tests.support.engines import Scripted, run, tiny_engine, tiny_model
from tests.support.profiles import examples, is_all, only_in_all
from tests.support.workloads import check_ragged_load, kv_of, prompt_of

POLICIES = [
    ("window", "verified"),
    ("quest", "snapkv"),
    *(only_in_all("all", own) for own in ("window", "relative", "verified", "quest", "snapkv", "topk")),
    *(only_in_all(policy, "quest") for policy in ("window", "relative", "snapkv", "topk")),
]
"""Policies of a draft model, and of the target beside it."""
LONGEST_ANSWER = 60 if is_all() else 30


def start(
    draft_dir: Path, policy: str, own: str, *, gamma: Sequence[int], ways: Sequence[Way], **settings: Any
) -> Engine:
    """Start an engine with both drafters, whose rounds have these numbers of drafts and ways, in cycles."""
    page = settings.setdefault("page_size", 4)
    speculation = {
        "gamma_max": 4,
        "model": str(draft_dir),
        "kv": kv_of(policy, page, 3),
        "self_kv": kv_of(own, page, 4),
    }
    engine = tiny_engine(tiny_model(), gamma="auto", speculation=speculation, **settings)  # type: ignore[arg-type]
    engine._scheduler.controller = Scripted([list(gamma)] * 2000, ways)
    return engine


@pytest.mark.parametrize(("policy", "own"), POLICIES)
@given(data=st.data())
@examples(3, 12, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_nobody_who_drafts_changes_output(draft_dir: Path, policy: str, own: str, data: st.DataObject) -> None:
    """Ragged batches that rows join and leave, chunked prompts, preemption, prefix hits, and drafters by turns of all
    lengths."""
    rng = random.Random(data.draw(st.integers(0, 1000)))
    page_size = data.draw(st.sampled_from([1, 4, 8]))
    turn = data.draw(st.integers(1, 7))
    ways = [Way(0, rng.choice([None, "self"])) for _ in range(20) for _ in range(rng.randint(1, turn))]
    engine = start(
        draft_dir,
        policy,
        own,
        gamma=[rng.choice([0, 4, rng.randint(0, 4)]) for _ in range(5)],
        ways=ways,
        page_size=page_size,
        max_model_len=200,
        cache={"num_pages": data.draw(st.sampled_from([None, 200 // page_size + 4])), "prefix": rng.random() < 0.5},
        scheduler={"max_batch_tokens": data.draw(st.sampled_from([9, 40, 64]))},
    )
    plain = tiny_engine(tiny_model(), gamma=0, page_size=16, max_model_len=200)
    check_ragged_load(engine, plain, rng, longest=LONGEST_ANSWER, prompts=9)


def drafted_by(engine: Engine, patch: pytest.MonkeyPatch) -> list[str]:
    """Record which model each later forward of one drafted token is of."""
    both: Any = engine._worker._drafter
    names = {id(both._drafter._model._runner): "model", id(both._drafter._own._runner): "self"}
    found, forward = [], Runner.forward

    def named(runner: Runner, batch: ForwardBatch) -> Tensor:
        if name := names.get(id(runner)):
            found.append(name)
        return forward(runner, batch)

    patch.setattr(Runner, "forward", named)
    return found


def one_row(tokens: int) -> AddRequest:
    return AddRequest(
        "0", prompt_of(50, 1), SamplingParams(max_tokens=tokens, temperature=1.0, seed=3, ignore_eos=True)
    )


@pytest.mark.parametrize("first", [None, "self"])
def test_the_plan_says_who_drafts(draft_dir: Path, first: Any) -> None:
    """Outputs and statistics name the draft model where it drafted, and the drafts are those of the model named."""
    ways = [Way(0, first)] * 6 + [Way(0, None if first == "self" else "self")] * 6
    engine = start(draft_dir, "window", "window", gamma=[2], ways=ways, max_model_len=300)
    with pytest.MonkeyPatch.context() as patch:
        found = drafted_by(engine, patch)
        (outputs,) = run(engine, [one_row(60)]).values()
    drafting = [output for output in outputs if output.drafted]
    assert found == ["model" if output.by_model else "self" for output in drafting for _ in range(output.drafted)]
    stats = engine.stats()
    by_model = [output for output in drafting if output.by_model]
    assert 0 < len(by_model) < len(drafting)
    assert stats.model_draft_tokens == sum(output.drafted for output in by_model)
    assert stats.model_accepted_tokens == sum(output.accepted for output in by_model)
    assert 0 < stats.model_draft_tokens < stats.draft_tokens


def test_a_draft_model_computes_nothing_while_the_target_drafts(draft_dir: Path) -> None:
    ways = [Way(0, "self")] * 15 + [Way()] * 100
    engine = start(draft_dir, "all", "window", gamma=[2], ways=ways, max_model_len=300)
    both: Any = engine._worker._drafter
    computed = []
    forward = Runner.forward

    def counted(runner: Runner, batch: ForwardBatch) -> Tensor:
        if runner.model is both._drafter._model._runner.model:
            computed.append(len(batch.token_ids))
        return forward(runner, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runner, "forward", counted)
        outputs = run(engine, [one_row(80)])["0"]
    before = [output for output in outputs if output.drafted and not output.by_model]
    assert len(before) == 15
    assert sum(computed) > 50 + sum(len(output.tokens) for output in before)  # it caught up on all of them


def test_verify_passes_vote_whoever_drafts(draft_dir: Path) -> None:
    """The target's drafts choose by what it looked at in the draft model's rounds."""
    engine = start(draft_dir, "window", "verified", gamma=[3], ways=[Way()], max_model_len=300)
    both: Any = engine._worker._drafter
    run(engine, [one_row(40)])
    choice = both._drafter._own._policy._choice
    assert choice.ends.max() * 4 > 50 + 40 - 10


def test_settings_of_both() -> None:
    both = SpeculationConfig.model_validate({"model": "draft", "kv": {"budget": 64, "sink": 4}})
    assert list(both.by_drafter()) == ["model", "self"]
    assert both.by_drafter()["model"] is both
    own = both.by_drafter()["self"]
    assert (own.model, own.draft_model, own.drafting_model, own.kv.budget) == (None, None, "self", 64)
    assert own.max_model_drafts == both.max_model_drafts
    assert list(own.by_drafter()) == ["self"]
    for fewer in (
        {"gamma": 3},
        {"drafter": "model"},
        {"gamma": 0},
        {"model": None},
        {"drafter": "ngram", "model": None},
    ):
        assert len(both.model_copy(update=fewer).by_drafter()) < 2
    of_all = SpeculationConfig.model_validate({"model": "draft", "kv": {"policy": "all"}})
    assert of_all.by_drafter()["self"].kv.budget == 512


def test_settings_that_do_not_fit(draft_dir: Path) -> None:
    def engine(**speculation: Any) -> Engine:
        return tiny_engine(tiny_model(), gamma="auto", speculation=speculation)  # type: ignore[arg-type]

    own = {"policy": "window", "budget": 30}
    engine(self_kv=own)  # as `kv` where nothing drafts
    with pytest.raises(ValueError, match=r"speculation.self_kv.budget \(30\) must be a multiple"):
        engine(model=str(draft_dir), self_kv=own)
    verified = {"policy": "verified", "budget": 8, "sink": 4}
    with pytest.raises(ValueError, match=r"speculation.kv: verified .* \(speculation.self_kv\)"):
        engine(model=str(draft_dir), kv=verified)
    with pytest.raises(ValueError, match=r"speculation.self_kv: verified chooses by what the target reads"):
        tiny_engine(
            tiny_model(),
            gamma="auto",  # type: ignore[arg-type]
            speculation={"model": str(draft_dir), "self_kv": verified},
            target_kv={"policy": "quest", "budget": 8},
        )


@pytest.mark.parametrize("gamma_max", [1, 2, 6])
def test_both_are_timed(draft_dir: Path, gamma_max: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The profile has draft steps of both at every number of rows, and the controller has ways of both."""
    monkeypatch.setattr("engine.worker.controllers.load_profile", lambda key: None)
    saved: list[StepSample] = []
    monkeypatch.setattr("engine.worker.controllers.save_profile", lambda key, samples: saved.extend(samples))
    speculation = {"model": str(draft_dir), "gamma_max": gamma_max, "kv": {"policy": "all"}}
    engine = tiny_engine(tiny_model(), gamma="auto", max_model_len=300, speculation=speculation)  # type: ignore[arg-type]
    drafted = [sample for sample in saved if sample.gamma and not sample.from_text]
    rows = {name: {sample.rows for sample in drafted if sample.drafter == name} for name in (None, "self")}
    assert rows[None] == rows["self"] == {1, 4, 8}
    controller: Any = engine._scheduler.controller
    assert {way.drafter for way in controller._ways} == {None, "self"}
    run(engine, [one_row(60)])
    assert engine.stats().draft_tokens


@pytest.mark.parametrize("reselect", [0, 8])
def test_what_a_draft_model_lacks_does_not_change_the_target_s_drafts(draft_dir: Path, reselect: int) -> None:
    """SnapKV of the target keeps its chosen tokens, though the draft model has computed none of the context."""
    own = kv_of("snapkv", 4, 4, reselect)
    params = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)

    def accepted(speculation: dict[str, Any], way: Way) -> list[tuple[int, int]]:
        fields = {"gamma_max": 4, **speculation}
        engine = tiny_engine(tiny_model(), gamma="auto", max_model_len=300, speculation=fields)  # type: ignore[arg-type]
        engine._scheduler.controller = Scripted([4] * 200, [way])
        outputs = run(engine, [AddRequest("0", prompt_of(90, 1), params)])["0"]
        return [(output.drafted, output.accepted) for output in outputs]

    alone = accepted({"drafter": "together", "kv": own}, Way())
    both = accepted({"model": str(draft_dir), "kv": kv_of("window", 4, 3), "self_kv": own}, Way(0, "self"))
    assert both == alone


@pytest.mark.parametrize(
    ("page_size", "kv", "budget"),
    [
        (4, {"policy": "window", "budget": 16, "sink": 4}, 16),
        (16, {"policy": "quest", "budget": 16}, 32),
        (16, {"policy": "topk", "budget": 500}, 512),
        (48, {"policy": "all"}, 528),
        (4, {"policy": "snapkv", "budget": 8, "recent": 4}, 20),
    ],
)
def test_the_window_beside_a_draft_model_fits(page_size: int, kv: dict[str, Any], budget: int) -> None:
    """A draft model's policy that is valid alone is valid beside the target's, where `self_kv` says nothing."""
    for drafter in ("model", "auto"):
        settings = SpeculationConfig.model_validate({"model": "draft", "drafter": drafter, "kv": kv})
        settings.check(page_size, 1)
    assert settings.by_drafter(page_size)["self"].kv.budget == budget


def test_memory_of_both_counts(draft_dir: Path) -> None:
    """The pool gets what the two policies leave, and weights of both are told."""
    kv = {"kv": kv_of("window", 4, 8), "self_kv": kv_of("snapkv", 4, 8)}

    def fixed(**speculation: Any) -> int:
        config = {
            "model": "tiny",
            "speculation": {"ngram_gamma_max": 8, **speculation},
            "cache": {"page_size": 4, "memory_gb": 0.1},
        }
        return resolve(EngineConfig.model_validate(config), tiny_model()).fixed_bytes

    model = fixed(drafter="model", model=str(draft_dir), kv=kv["kv"])
    own = fixed(drafter="self", kv=kv["self_kv"])
    assert model > 0
    assert own > 0
    assert fixed(model=str(draft_dir), **kv) == model + own
