"""Requests with the same prompt share its computed pages, and get the same output as each gets alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from engine.core import Engine
from engine.messages import AddRequest
from engine.params import SamplingParams
from engine.plan import RoundPlan, RoundResult
from engine.worker.worker import noop
from tests.support.engines import complete, run, tiny_engine, tiny_model, tokens
from tests.support.profiles import is_all, only_in_all

PROMPT = [2 + 7 * i % 60 for i in range(90)]
SNAPKV = {"policy": "snapkv", "budget": 16, "recent": 8, "queries": 6}


def requests(count: int = 4, **others: Any) -> list[AddRequest]:
    """Choices of different lengths from one prompt, and one unrelated request among them."""
    found = []
    for i in range(count):
        params = SamplingParams(max_tokens=20 + 10 * i, temperature=1.0, seed=i, ignore_eos=True, **others)
        found.append(AddRequest(str(i), PROMPT, params))
    found.insert(2, AddRequest("other", PROMPT[::-1], SamplingParams(max_tokens=30, temperature=1.0, ignore_eos=True)))
    return found


def alone(wanted: list[AddRequest]) -> dict[str, list[int]]:
    """Complete each request by itself, on an engine without speculation or prefix cache."""
    engine = tiny_engine(tiny_model(), gamma=0, max_model_len=300, cache={"prefix": False})
    found = {each.id: complete(engine, each.prompt, each.params) for each in wanted}
    assert engine.stats().prefix_queries == engine.stats().pages_cached == 0
    return found


@cache
def four_alone() -> dict[str, list[int]]:
    return alone(requests())


def watched(engine: Engine) -> dict[int, int]:
    """Record the number of tokens that each row slot receives from another row."""
    found: dict[int, int] = {}
    execute = engine._worker.execute

    def execute_and_look(plan: RoundPlan, meanwhile: Callable[[], None] = noop) -> RoundResult:
        found.update({start.row: start.computed for start in plan.starts if start.computed})
        return execute(plan, meanwhile)

    engine._worker.execute = execute_and_look  # type: ignore[method-assign]
    return found


@pytest.mark.parametrize("gamma", [only_in_all(0), 3])
@pytest.mark.parametrize("kv", [{"budget": 16, "sink": 4}, SNAPKV, {"policy": "all"}], ids=["window", "snapkv", "all"])
@pytest.mark.parametrize("drafter", ["self", "model"])
def test_choices_are_what_they_are_alone(draft_dir: Path, drafter: str, kv: dict[str, Any], gamma: int) -> None:
    speculation: dict[str, Any] = {"kv": kv, "drafter": drafter}
    if drafter == "model":
        speculation["model"] = str(draft_dir)
    engine = tiny_engine(tiny_model(), gamma=gamma, speculation=speculation, max_model_len=300)
    shared = watched(engine)
    outputs = run(engine, requests())
    assert {id: tokens(out) for id, out in outputs.items()} == four_alone()
    own = 6 if gamma and kv is SNAPKV else 1
    assert set(shared.values()) == {(len(PROMPT) - own) // 4 * 4}
    assert len(shared) == 3


def test_preempted_and_aborted_choices_leave_no_page_behind() -> None:
    engine = tiny_engine(tiny_model(), gamma=2, cache={"num_pages": 50}, max_model_len=190)
    count = 6 if is_all() else 5
    expected = alone(requests(count))
    aborts: list[dict[str, int]] = [{}, {"0": 30, "3": 12}, {"0": 4}, {"1": 8, "2": 9}]
    for leaves in aborts if is_all() else aborts[:2]:
        # It checks after every round that all pages are accounted for.
        outputs = run(engine, requests(count), leaves=leaves)
        for id, out in outputs.items():
            found = tokens(out)
            assert found == (expected[id][: len(found)] if id in leaves else expected[id])
    assert engine.stats().preemptions > 0


def test_who_is_told_of_its_prompt_computes_it() -> None:
    engine = tiny_engine(tiny_model(), gamma=0, max_model_len=300)
    shared = watched(engine)
    outputs = run(engine, requests(3, prompt_logprobs=0))
    assert not shared
    for i in range(3):
        assert len(outputs[str(i)][0].prompt_logprobs or ()) == len(PROMPT) - 1


def test_other_prompts_are_not_shared() -> None:
    engine = tiny_engine(tiny_model(), gamma=0, max_model_len=300)
    shared = watched(engine)
    params = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
    pair = [AddRequest("a", PROMPT, params), AddRequest("b", [3, *PROMPT[1:]], params)]
    expected = alone(pair)
    assert {id: tokens(out) for id, out in run(engine, pair).items()} == expected
    assert not shared


def test_kv_that_is_not_finite_fails_no_later_request() -> None:
    """A page is overwritten by NaN once, as by a fault of the device, before its request has computed all tokens."""
    engine = tiny_engine(tiny_model(), gamma=0, check_invariants=False)
    execute, rounds = engine._worker.execute, iter(range(1000))

    def execute_and_spoil(plan: RoundPlan, meanwhile: Callable[[], None] = noop) -> RoundResult:
        result = execute(plan, meanwhile)
        if next(rounds) == 0:
            engine._worker._target.pool._data[:, :, engine._scheduler.running[0].pages[1]] = float("nan")
        return result

    engine._worker.execute = execute_and_spoil  # type: ignore[method-assign]
    reasons = []
    for i in range(3):
        (*_, last) = run(engine, [AddRequest("x", [*PROMPT, i], SamplingParams(max_tokens=3, ignore_eos=True))])["x"]
        reasons.append(last.finish_reason)
    assert reasons == ["abort", "length", "length"]
