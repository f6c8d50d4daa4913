"""Every drafter and policy leaves output unchanged, and reads only KV that was written and that its budget allows. In
float64, on tiny random models."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from torch import Tensor

from engine.batch.runner import Runner
from engine.config.deployment import ConfigError
from engine.core import Engine
from engine.messages import AddRequest
from engine.params import SamplingParams
from engine.plan import RoundPlan, RoundResult
from engine.scheduler.controller import Way
from engine.scheduler.stats import acceptance_rate
from models.batch import ForwardBatch
from models.decoder import DecoderModel
from tests.support.engines import Scripted, complete, run, tiny_engine, tiny_model, tokens
from tests.support.profiles import examples, is_all, only_in_all
from tests.support.ranks import DRAFT, write_random_model
from tests.support.workloads import EDGES, check_ragged_load, kv_of, prompt_of


@cache
def model() -> DecoderModel:
    return tiny_model()


POLICIES = {
    "self": ("window", "relative", "verified", "quest", "snapkv", "topk", "all"),
    "model": ("window", "relative", "quest", "snapkv", "topk", "all"),
}
"""Drafters, and policies of their drafts."""
LONGEST_ANSWER, MANY = (60, 100) if is_all() else (30, 70)


def both(**kept: str) -> list[Any]:
    """Drafters with their policies. kept: those that `make test` has, too, by drafter; test_policy_law has the rest."""
    return [
        (drafter, policy) if policy in kept[drafter].split() else only_in_all(drafter, policy)
        for drafter, policies in POLICIES.items()
        for policy in policies
    ]


@pytest.mark.parametrize(("drafter", "policy"), both(self="relative snapkv", model="window quest"))
@given(data=st.data())
@examples(3, 16, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_drafter_or_policy_changes_output(draft_dir: Path, drafter: str, policy: str, data: st.DataObject) -> None:
    """Ragged batches that rows join and leave, chunked prompts, preemption, and rows that draft fewer tokens than
    others."""
    page_size = data.draw(st.sampled_from([1, 4, 8]))
    gamma = data.draw(st.integers(1, 6))
    reselect = data.draw(st.sampled_from([0, 5])) if drafter == "self" else 0
    kv = kv_of(policy, page_size, data.draw(st.integers(1, 5)), reselect)
    pages = data.draw(st.sampled_from([None, 200 // page_size + 4]))
    engine = tiny_engine(
        model(),
        gamma=gamma,
        page_size=page_size,
        max_model_len=200,
        cache={"num_pages": pages},
        scheduler={"max_batch_tokens": data.draw(st.sampled_from([9, 40, 64]))},
        speculation={"drafter": drafter, "model": str(draft_dir) if drafter == "model" else None, "kv": kv},
    )
    plain = tiny_engine(model(), gamma=0, page_size=16, max_model_len=200)
    rng = random.Random(data.draw(st.integers(0, 1000)))
    check_ragged_load(engine, plain, rng, longest=LONGEST_ANSWER, prompts=99)


def long_run(engine: Engine, prompt: int, new: int, temperature: float = 1.0) -> list[int]:
    params = SamplingParams(max_tokens=new, temperature=temperature, seed=3, ignore_eos=True)
    return complete(engine, prompt_of(prompt, 1), params)


@cache
def plain_run(prompt: int, new: int) -> list[int]:
    """Output of `long_run` without drafts."""
    return long_run(tiny_engine(model(), gamma=0, max_model_len=prompt + new), prompt, new)


@pytest.fixture(scope="module")
def short_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a draft model with few positions."""
    draft = replace(DRAFT, max_position_embeddings=192)
    return write_random_model(tmp_path_factory.mktemp("models") / "short", draft)


# The other combinations have nothing that runs out or wraps around. The draft model has 192 positions.
@pytest.mark.parametrize(
    ("drafter", "policy"),
    [
        ("self", "relative"),
        ("model", "snapkv"),
        only_in_all("self", "snapkv"),
        only_in_all("model", "window"),
        only_in_all("self", "verified"),
        only_in_all("self", "quest"),
        only_in_all("model", "quest"),
    ],
)
def test_hundreds_of_tokens_past_a_small_budget(short_dir: Path, drafter: str, policy: str) -> None:
    kv = kv_of(policy, 8, 4, reselect=50 if drafter == "self" else 0)
    speculation = {"drafter": drafter, "model": str(short_dir) if drafter == "model" else None, "kv": kv}
    engine = tiny_engine(model(), gamma=3, page_size=8, max_model_len=350, speculation=speculation)
    new = 220 if is_all() else 110
    assert long_run(engine, 100, new) == plain_run(100, new)
    stats = engine.stats()
    assert stats.accepted_tokens > 10
    assert stats.rejections > 10


@pytest.mark.parametrize("prompt", [only_in_all(1), only_in_all(30), 100])
@pytest.mark.parametrize(("drafter", "policy"), both(self="relative verified", model="window snapkv"))
def test_a_budget_that_covers_the_context_is_dense(twin_dir: Path, drafter: str, policy: str, prompt: int) -> None:
    """A draft with the target's weights that reads everything equals the target and is never wrong, also after rounds
    that gave it fewer drafts because of another row's end or its own limit."""
    speculation = {
        "drafter": drafter,
        "model": str(twin_dir) if drafter == "model" else None,
        "kv": kv_of(policy, 8, 24),
    }
    engine = tiny_engine(model(), gamma=4, page_size=8, max_model_len=208, speculation=speculation)
    long_run(engine, prompt, 100)
    stats = engine.stats()
    assert acceptance_rate(stats) == 1.0
    assert stats.accepted_tokens > 70


@pytest.mark.parametrize(
    ("drafter", "prompt"),
    [
        *(("self", 1), ("model", 1)),
        *(only_in_all(drafter, prompt) for drafter in POLICIES for prompt in (10, 33, 70)),
    ],
)
def test_a_row_that_first_drafts_long_after_a_short_prompt(draft_dir: Path, drafter: str, prompt: int) -> None:
    """A prompt shorter than what SnapKV selects from it leaves nothing to select. Drafts begin when the budget of 48
    tokens is long exceeded."""
    engine = tiny_engine(
        model(),
        gamma=3,
        page_size=8,
        max_model_len=300,
        speculation={
            "drafter": drafter,
            "model": str(draft_dir) if drafter == "model" else None,
            "kv": kv_of("snapkv", 8, 4),
        },
    )
    plain, new = (80, 140) if is_all() else (60, 120)
    engine._scheduler.controller = Scripted([0] * plain + [3] * 100)
    assert long_run(engine, prompt, new) == plain_run(prompt, new)
    assert engine.stats().draft_tokens > 50


@pytest.mark.parametrize(("drafter", "policy"), both(self="snapkv", model="quest all"))
def test_dense_drafts_stay_right_however_often_they_pause(twin_dir: Path, drafter: str, policy: str) -> None:
    """Any number of rounds without drafts in between: the draft cache catches up on everything it lacks."""
    speculation = {
        "drafter": drafter,
        "model": str(twin_dir) if drafter == "model" else None,
        "kv": kv_of(policy, 8, 24),
    }
    engine = tiny_engine(model(), gamma=4, page_size=8, max_model_len=208, speculation=speculation)
    rng = random.Random(2)
    engine._scheduler.controller = Scripted([rng.choice([0, 0, 0, 0, 1, 2, 4]) for _ in range(160)])
    long_run(engine, 40, 150 if is_all() else 80)
    stats = engine.stats()
    assert stats.rejections == 0
    assert stats.accepted_tokens > (30 if is_all() else 15)


@pytest.mark.parametrize(("drafter", "policy"), both(self="verified quest", model="window snapkv"))
@given(data=st.data())
@examples(3, 24, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_nothing_is_read_that_was_not_written(draft_dir: Path, drafter: str, policy: str, data: st.DataObject) -> None:
    """Over pools that start as NaN, in rounds with any number of drafts, after pauses of any length."""
    page_size, gamma = data.draw(st.sampled_from([1, 4, 8])), data.draw(st.sampled_from([1, 3, 6]))
    engine = tiny_engine(
        tiny_model(),
        gamma=gamma,
        page_size=page_size,
        max_model_len=200,
        scheduler={"max_batch_tokens": data.draw(st.sampled_from([9, 40]))},
        speculation={
            "drafter": drafter,
            "model": str(draft_dir) if drafter == "model" else None,
            "kv": kv_of(policy, page_size, data.draw(st.integers(1, 5))),
        },
    )
    rng = random.Random(data.draw(st.integers(0, 1000)))
    pause = rng.randrange(20)
    engine._scheduler.controller = Scripted(
        [gamma, *(rng.choice([0, gamma, rng.randrange(gamma + 1)]) if n % 40 > pause else 0 for n in range(400))]
    )
    proposer: Any = engine._worker._drafter
    for runner in (engine._worker._target, proposer._drafter._runner, getattr(proposer._drafter, "_full", None)):
        if runner is not None:
            runner.pool._data.fill_(float("nan"))
    forward = Runner.forward

    def watched(runner: Runner, batch: ForwardBatch) -> Tensor:
        logits = forward(runner, batch)
        assert not logits.isnan().any()
        return logits

    requests, joins = [], {}
    for i in range(4):
        params = SamplingParams(max_tokens=rng.randrange(1, LONGEST_ANSWER), temperature=1.0, seed=i, ignore_eos=True)
        requests.append(AddRequest(str(i), prompt_of(rng.choice(EDGES), i), params))
        joins[str(i)] = rng.randrange(20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runner, "forward", watched)
        run(engine, requests, joins=joins)


def forwards(patch: pytest.MonkeyPatch, engine: Engine) -> list[int]:
    """Record the number of tokens of every later forward of the engine's draft model."""
    drafter: Any = engine._worker._drafter
    draft, found = drafter._drafter._runner.model, []
    forward = Runner.forward

    def counted(runner: Runner, batch: ForwardBatch) -> Tensor:
        if runner.model is draft:
            found.append(len(batch.token_ids))
        return forward(runner, batch)

    patch.setattr(Runner, "forward", counted)
    return found


@pytest.mark.parametrize("policy", [only_in_all(each) if each != "snapkv" else each for each in POLICIES["model"]])
def test_a_draft_model_sees_nothing_before_it_drafts(draft_dir: Path, policy: str) -> None:
    """The draft model computes nothing before the row drafts. Then it catches up in rounds of a bounded number of
    tokens, while the row decodes plainly."""
    engine = tiny_engine(
        model(),
        gamma=3,
        page_size=4,
        max_model_len=300,
        scheduler={"max_batch_tokens": 32},
        speculation={"drafter": "model", "model": str(draft_dir), "kv": kv_of(policy, 4, 6)},
    )
    engine._scheduler.controller = Scripted([0] * 20 + [3] * 100)
    rounds: list[tuple[int, int, int]] = []
    execute = engine._worker.execute

    with pytest.MonkeyPatch.context() as patch:
        found = forwards(patch, engine)

        def watched(plan: RoundPlan, meanwhile: Callable[[], None]) -> RoundResult:
            before = len(found)
            result = execute(plan, meanwhile)
            rounds.append(
                (sum(work.new for work in plan.work), sum(found[before:]), result.rows[0].drafted if result.rows else 0)
            )
            return result

        patch.setattr(engine._worker, "execute", watched)
        text = long_run(engine, 150, MANY)
    assert text == plain_run(150, MANY)
    prompt = -(-150 // 32)
    assert all((fed, drafted) == (0, 0) for _, fed, drafted in rounds[: prompt + 20])
    catching_up = [fed for _, fed, drafted in rounds[prompt + 20 :] if not drafted]
    assert catching_up[:5] == [32] * 5
    assert all(fed <= 32 + 2 * 3 for _, fed, _ in rounds)
    first = next(fed for _, fed, drafted in rounds if drafted)
    assert first > 3  # the rest of the catch-up, and the drafts
    assert engine.stats().draft_tokens > 50


def test_a_request_that_may_not_draft_costs_a_draft_model_nothing(draft_dir: Path) -> None:
    speculation = {"drafter": "model", "model": str(draft_dir), "kv": kv_of("all", 4, 6)}
    engine = tiny_engine(model(), gamma=3, max_model_len=300, speculation=speculation)
    with pytest.MonkeyPatch.context() as patch:
        found = forwards(patch, engine)
        complete(engine, prompt_of(130, 1), SamplingParams(max_tokens=40, max_draft_tokens=0, ignore_eos=True))
        assert found == []
        complete(engine, prompt_of(130, 1), SamplingParams(max_tokens=40, ignore_eos=True))
        assert sum(found) > 130


def long_and_short() -> list[AddRequest]:
    return [
        AddRequest(
            str(i), prompt_of(length, i), SamplingParams(max_tokens=LONGEST_ANSWER + 10, temperature=1.0, seed=i)
        )
        for i, length in enumerate([250, 5, 120, 33, 9, 190] if is_all() else [150, 5, 90, 33])
    ]


@cache
def plain_texts() -> dict[str, list[int]]:
    """Output of each of `long_and_short` alone, without drafts."""
    plain = tiny_engine(model(), gamma=0, max_model_len=400)
    return {request.id: complete(plain, request.prompt, request.params) for request in long_and_short()}


@pytest.mark.parametrize("policy", [only_in_all(each) if each != "window" else each for each in POLICIES["model"]])
def test_a_draft_model_as_it_pays(draft_dir: Path, policy: str) -> None:
    """gamma: auto, with long and short prompts: some rows catch up, and the output is unchanged."""
    speculation = {"drafter": "model", "model": str(draft_dir), "kv": kv_of(policy, 4, 6)}
    engine = tiny_engine(model(), gamma="auto", max_model_len=400, speculation=speculation)  # type: ignore[arg-type]
    outputs = run(engine, long_and_short(), joins={"2": 5, "4": 40} if is_all() else {"2": 5})
    assert {id: tokens(out) for id, out in outputs.items()} == plain_texts()


@pytest.mark.parametrize(
    ("drafter", "positions"),
    [
        *(("self", "relative"), ("model", "absolute")),
        *(only_in_all("self", "absolute"), only_in_all("model", "relative")),
    ],
)
def test_windows_of_several_budgets(draft_dir: Path, drafter: str, positions: str) -> None:
    """The drafts of each round read at most its budget, and the output is unchanged."""
    speculation = {
        "drafter": drafter,
        "model": str(draft_dir) if drafter == "model" else None,
        "kv": {"policy": "window", "budget": 64, "sink": 4, "positions": positions},
    }
    engine = tiny_engine(model(), gamma="auto", max_model_len=400, speculation=speculation)  # type: ignore[arg-type]
    engine._scheduler.controller = Scripted([3] * 500, [Way(64), Way(32), Way(16)])
    proposer: Any = engine._worker._drafter
    policy = proposer._drafter._policy
    read: list[int] = []
    forward = Runner.forward

    def watched(runner: Runner, batch: ForwardBatch) -> Tensor:
        if runner.attention is policy.attention and batch.attention.query_lengths == [1]:
            read.append(batch.attention.kv_lengths[0])
        return forward(runner, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runner, "forward", watched)
        text = long_run(engine, 150, MANY)
    assert text == plain_run(150, MANY)
    for budget in (64, 32, 16):
        assert any(budget - 4 < each <= budget for each in read)
    assert max(read) <= 64
    assert engine.stats().accepted_tokens > 0


def test_a_draft_model_needs_the_same_vocabulary(tmp_path: Path) -> None:
    other = write_random_model(tmp_path / "other", replace(DRAFT, vocab_size=65))
    with pytest.raises(ConfigError, match="vocabulary of 65 tokens, the target of 64"):
        tiny_engine(model(), gamma=2, speculation={"drafter": "model", "model": str(other)})
