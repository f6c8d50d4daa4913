"""Prompts, sampling parameters and KV policies that many tests use."""

from __future__ import annotations

import random
from typing import Any

from engine.core import Engine
from engine.messages import AddRequest
from engine.params import SamplingParams
from tests.support.engines import TINY, complete_all, run, tokens


def prompt_of(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(2, TINY.vocab_size) for _ in range(length)]


SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 0.0, "presence_penalty": 1.5, "frequency_penalty": 0.5},
    {"temperature": 1.0, "repetition_penalty": 1.4, "frequency_penalty": -0.3},
    {"temperature": 0.0, "repetition_penalty": 0.8},
    {"temperature": 1.0, "logit_bias": {5: 3.0, 9: -100.0, 40: 1.0}},
    {"temperature": 1.0, "min_tokens": 20, "logit_bias": {1: 5.0}},
    {"temperature": 0.5, "stop_token_ids": (7, 11, 13), "min_tokens": 3},
]


EDGES = [1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 33, 63, 64, 65, 130]


def kv_of(policy: str, page_size: int, pages: int, reselect: int = 0) -> dict[str, Any]:
    """Settings of a KV policy with a budget of `pages` + 2 pages."""
    budget = (pages + 2) * page_size
    policies: dict[str, dict[str, Any]] = {
        "window": {"policy": "window", "budget": budget, "sink": page_size},
        "relative": {"policy": "window", "budget": budget, "sink": page_size, "positions": "relative"},
        "snapkv": {
            "policy": "snapkv",
            "budget": budget,
            "recent": 2 * page_size,
            "queries": 6,
            "kernel": 3,
            "reselect": reselect,
        },
        "verified": {"policy": "verified", "budget": budget, "sink": page_size},
        "quest": {"policy": "quest", "budget": budget, "sink": page_size, "interval": 2},
        "topk": {"policy": "topk", "budget": budget},
        "all": {"policy": "all"},
    }
    return policies[policy]


def check_ragged_load(engine: Engine, plain: Engine, rng: random.Random, *, longest: int, prompts: int) -> None:
    """Check that rows which join and leave have the texts that `plain` gives each of them alone.

    longest: exclusive limit of an answer's tokens. prompts: number of different texts that prompts begin with.
    """
    requests, joins, leaves = [], {}, {}
    for i in range(rng.randrange(1, 7)):
        params = SamplingParams(
            max_tokens=rng.randrange(1, longest),
            seed=i,
            max_draft_tokens=rng.choice([None, None, None, 0, 2]),
            ignore_eos=rng.random() < 0.7,
            **rng.choice(SAMPLING),
        )
        requests.append(AddRequest(str(i), prompt_of(rng.choice(EDGES), rng.randrange(prompts)), params))
        joins[str(i)] = rng.randrange(12)
        if rng.random() < 0.2:
            leaves[str(i)] = joins[str(i)] + rng.randrange(9)
    outputs = run(engine, requests, joins=joins, leaves=leaves)
    oracle = complete_all(plain, requests)
    for request in requests:
        expected, got = oracle[request.id], tokens(outputs[request.id])
        assert got == (expected[: len(got)] if request.id in leaves else expected)
