"""Text of a target with sealed pages does not depend on drafts, chunks, prefix hits, preemption or lost rounds."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.core import Engine
from engine.messages import AddRequest
from engine.params import SamplingParams
from engine.scheduler.controller import Way
from engine.speculation.drafters import SelfDrafter
from kernels.kv.kv_bits import SEALED_GROUP
from tests.support.conversations import check_answers, check_hits, crowd, play, random_turns
from tests.support.engines import Scripted, complete, run, tiny_engine, tiny_model
from tests.support.prefix_engines import VARYING, model_on_kernels, trouble
from tests.support.profiles import examples, is_all, only_in_all
from tests.support.workloads import prompt_of

LONGEST = 5 * SEALED_GROUP + 20
FORMATS = ("int8", "int4x2")
WAYS = [Way(), Way(), Way(0, "self"), Way(0, "self"), Way(0, "self")]
"""Of rounds in which either a draft model or the target drafts."""
POLICIES: dict[str, dict[str, Any]] = {
    "all": {"policy": "all"},
    "window": {"policy": "window", "budget": 2 * SEALED_GROUP, "sink": 4},
    "relative": {"policy": "window", "budget": 2 * SEALED_GROUP, "sink": 4, "positions": "relative"},
    "verified": {"policy": "verified", "budget": SEALED_GROUP, "sink": 4},
    "quest": {"policy": "quest", "budget": SEALED_GROUP, "sink": 4, "interval": 2},
    "snapkv": {"policy": "snapkv", "budget": 2 * SEALED_GROUP, "recent": SEALED_GROUP},
    "topk": {"policy": "topk", "budget": 40},
}


@cache
def target(exact: bool) -> Any:
    """exact: on CPU kernels, in bfloat16, where rows do not change each other's bits."""
    return model_on_kernels(torch.bfloat16) if exact else tiny_model()


def engine_of(
    exact: bool,
    kv_format: str,
    gamma: int | str,
    policy: str = "all",
    draft: Path | None = None,
    drafter: str = "self",
    **settings: Any,
) -> Engine:
    speculation: dict[str, Any] = {"kv": POLICIES[policy], "drafter": drafter}
    if draft is not None and drafter == "both":
        own = {"drafter": "together", "model": str(draft), "self_kv": POLICIES[policy], "gamma_max": gamma or 1}
        gamma = "auto" if gamma else 0
        speculation |= own | {"kv": POLICIES["window"]}
    elif draft is not None and gamma:
        speculation |= {"drafter": "model", "model": str(draft)}
    cache = {"format": kv_format, "num_pages": 100, "memory_gb": None} | settings.pop("cache", {})
    scheduler = {"max_rows": 5, "max_batch_tokens": 600} | settings.pop("scheduler", {})
    return tiny_engine(
        target(exact),
        gamma=gamma,  # type: ignore[arg-type]
        page_size=SEALED_GROUP,
        speculation=speculation,
        cache=cache,
        scheduler=scheduler,
        max_model_len=LONGEST,
        **settings,
    )


@cache
def plain(exact: bool, kv_format: str) -> Engine:
    return engine_of(exact, kv_format, 0, cache={"prefix": False})


@pytest.mark.parametrize(
    ("exact", "kv_format"),
    [
        pytest.param(False, "int8", id="float64-int8"),
        pytest.param(True, "int4x2", id="bfloat16-int4x2"),
        only_in_all(True, "int8", id="bfloat16-int8"),
        only_in_all(False, "int4x2", id="float64-int4x2"),
    ],
)
@given(
    drafter=st.sampled_from(["self", "together", "model", "both"]),
    seed=st.integers(0, 2**32),
    gamma=st.sampled_from([0, 1, 4]),
    varying=st.booleans(),
    policy=st.sampled_from(sorted(POLICIES)),
    batch_tokens=st.sampled_from([7, 64, 100, 600]),
    spare=st.none() | st.integers(0, 3),
    cut=st.booleans(),
    count=st.integers(1, 8 if is_all() else 4),
)
@examples(3, 60)
def test_sealed_pages_read_the_same_whatever_else_happens(
    draft_dir: Path,
    exact: bool,
    kv_format: str,
    drafter: str,
    seed: int,
    gamma: int,
    varying: bool,
    policy: str,
    batch_tokens: int,
    spare: int | None,
    cut: bool,
    count: int,
) -> None:
    if drafter == "model" and policy in ("verified", "relative"):
        policy = "window"  # a draft model has no verify passes
    pages = 100 if spare is None else -(-LONGEST // SEALED_GROUP) + spare
    engine = engine_of(
        exact,
        kv_format,
        gamma,
        policy,
        draft_dir if drafter in ("model", "both") else None,
        "self" if drafter == "model" else drafter,
        cache={"num_pages": pages},
        scheduler={"max_batch_tokens": batch_tokens},
    )
    if varying and gamma >= max(map(max, VARYING)):
        engine._scheduler.controller = Scripted(VARYING * 400, WAYS if drafter == "both" else [Way()])
    rng = random.Random(seed)
    if cut:
        trouble(engine, rng)
    answer = 150 if is_all() else 90
    turns = (crowd(3, 150) if spare is not None else []) + random_turns(rng, SEALED_GROUP, count, 200, answer)
    played = play(engine, turns, LONGEST)
    check_answers(played, run(plain(exact, kv_format), played.requests), exact=exact)
    if not cut:
        check_hits(engine, played)


@pytest.mark.parametrize("kv_format", FORMATS)
def test_drafts_end_with_a_group(kv_format: str) -> None:
    """A verify pass never has queries of two groups, and its drafts reach the end of one."""
    engine = engine_of(False, kv_format, 4)
    rounds: list[tuple[int, int]] = []
    execute = engine._worker.execute

    def watch(plan: Any, *rest: Any) -> Any:
        rounds.extend((work.computed, work.gamma) for work in plan.work if work.computed)
        return execute(plan, *rest)

    engine._worker.execute = watch  # type: ignore[method-assign, assignment]
    complete(engine, prompt_of(10, 1), SamplingParams(max_tokens=200 if is_all() else 80, ignore_eos=True))
    assert all(first // SEALED_GROUP == (first + gamma) // SEALED_GROUP for first, gamma in rounds)
    assert any((first + gamma + 1) % SEALED_GROUP == 0 and gamma for first, gamma in rounds)


@pytest.mark.parametrize("kv_format", FORMATS)
def test_drafts_read_the_upper_codes_where_there_are_any(kv_format: str) -> None:
    """Which no text shows."""
    engine = engine_of(False, kv_format, 2, "window")
    drafter = engine._worker._drafter._drafter
    assert isinstance(drafter, SelfDrafter)
    for runner, drafts in ((drafter._runner, kv_format == "int4x2"), (engine._worker._target, False)):
        sealed = runner.pool.layer(0).sealed
        assert sealed is not None
        assert sealed.drafts == drafts


def test_the_formats_are_read() -> None:
    """Log-probabilities differ from those of dense KV, a little."""
    prompts = [prompt_of(200, seed) for seed in range(6 if is_all() else 2)]
    new = 40 if is_all() else 15
    requests = [
        AddRequest(str(i), prompt, SamplingParams(max_tokens=new, ignore_eos=True, logprobs=0))
        for i, prompt in enumerate(prompts)
    ]
    dense = run(engine_of(False, "dense", 0), requests)
    same = run(engine_of(False, "dense", 4), requests)
    int8 = run(engine_of(False, "int8", 0), requests)

    def scores(outputs: Any) -> list[float]:
        return [each.logprob for output in outputs for each in output.logprobs]

    for id, outputs in dense.items():
        assert scores(same[id]) == pytest.approx(scores(outputs))
        assert scores(int8[id])[:5] != pytest.approx(scores(outputs)[:5], abs=1e-9)
        assert scores(int8[id])[:1] == pytest.approx(scores(outputs)[:1], abs=0.1)
