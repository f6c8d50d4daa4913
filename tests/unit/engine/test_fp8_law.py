"""Text of a target whose KV is fp8 does not depend on drafts, chunks, prefix hits, preemption or lost rounds."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.config.deployment import ConfigError
from engine.core import Engine
from engine.messages import AddRequest
from engine.params import SamplingParams
from kernels.kv.kv_pool import FP8
from tests.support.conversations import check_answers, check_hits, crowd, play, random_turns
from tests.support.engines import Scripted, run, tiny_engine, tiny_model
from tests.support.prefix_engines import VARYING, model_on_kernels, trouble
from tests.support.profiles import examples
from tests.support.workloads import prompt_of

LONGEST = 120
POLICIES: dict[str, dict[str, Any]] = {
    "all": {"policy": "all"},
    "window": {"policy": "window", "budget": 24, "sink": 4},
    "relative": {"policy": "window", "budget": 24, "sink": 4, "positions": "relative"},
    "verified": {"policy": "verified", "budget": 24, "sink": 4},
    "quest": {"policy": "quest", "budget": 24, "sink": 4, "interval": 2},
    "snapkv": {"policy": "snapkv", "budget": 48, "recent": 24, "queries": 8},
    "topk": {"policy": "topk", "budget": 20},
}


def engine_of(gamma: int, policy: str = "all", page: int = 8, kv_format: str = "fp8", **settings: Any) -> Engine:
    cache = {"format": kv_format, "num_pages": 100, "memory_gb": None} | settings.pop("cache", {})
    scheduler = {"max_rows": 5, "max_batch_tokens": 600} | settings.pop("scheduler", {})
    return tiny_engine(
        tiny_model(),
        gamma=gamma,
        page_size=page,
        speculation={"kv": POLICIES[policy]},
        cache=cache,
        scheduler=scheduler,
        max_model_len=LONGEST,
        **settings,
    )


@cache
def plain() -> Engine:
    return engine_of(0, cache={"prefix": False})


@given(
    seed=st.integers(0, 2**32),
    gamma=st.sampled_from([0, 1, 4]),
    varying=st.booleans(),
    policy=st.sampled_from(sorted(POLICIES)),
    page=st.sampled_from([4, 8]),
    batch_tokens=st.sampled_from([7, 30, 600]),
    spare=st.none() | st.integers(0, 3),
    cut=st.booleans(),
    count=st.integers(1, 8),
)
@examples(4, 100)
def test_tokens_are_rounded_the_same_whatever_else_happens(
    seed: int,
    gamma: int,
    varying: bool,
    policy: str,
    page: int,
    batch_tokens: int,
    spare: int | None,
    cut: bool,
    count: int,
) -> None:
    pages = 100 if spare is None else -(-LONGEST // page) + spare
    engine = engine_of(gamma, policy, page, cache={"num_pages": pages}, scheduler={"max_batch_tokens": batch_tokens})
    assert engine._worker._target.pool._data.dtype == FP8
    if varying and gamma > 1:
        engine._scheduler.controller = Scripted(VARYING * 400)
    rng = random.Random(seed)
    if cut:
        trouble(engine, rng)
    turns = (crowd(3, 60) if spare is not None else []) + random_turns(rng, page, count, 70, 40)
    played = play(engine, turns, LONGEST)
    check_answers(played, run(plain(), played.requests), exact=False)
    if not cut:
        check_hits(engine, played)


def test_the_format_is_read() -> None:
    """Log-probabilities differ from those of dense KV, a little."""
    requests = [
        AddRequest(str(i), prompt_of(80, i), SamplingParams(max_tokens=4, ignore_eos=True, logprobs=0))
        for i in range(3)
    ]
    dense, fp8 = (run(engine_of(0, kv_format=each), requests) for each in ("dense", "fp8"))
    for id, outputs in dense.items():
        first, other = outputs[0].logprobs, fp8[id][0].logprobs
        assert first
        assert other
        exact, rounded = first[0].logprob, other[0].logprob
        assert rounded != pytest.approx(exact, abs=1e-9)
        assert rounded == pytest.approx(exact, abs=0.5)


def test_a_token_takes_half_the_memory_of_bfloat16() -> None:
    engine = engine_of(0)
    shape = engine._worker._target.model
    assert engine.stats().kv_token_bytes == 2 * shape.num_layers * shape.kv_heads * shape.head_dim


def test_cpu_kernels_refuse_it() -> None:
    with pytest.raises(ConfigError, match="cpu kernels do not read fp8 KV, but dense, int8, int4x2"):
        tiny_engine(model_on_kernels(torch.bfloat16), gamma=0, page_size=8, cache={"format": "fp8", "num_pages": 20})
