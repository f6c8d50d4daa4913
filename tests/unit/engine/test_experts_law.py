"""Text of a mixture of experts does not depend on drafts: in float32 and bfloat16 on CPU kernels, to the bit."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from engine.messages import AddRequest, RequestOutput
from engine.params import SamplingParams
from models.config import ModelConfig
from models.decoder import DecoderModel
from models.loader import random_model
from models.model_config import ExpertsConfig
from parallel.group import Group
from parallel.matrix_layer import WeightChoice
from tests.support.engines import run, tiny_engine, tokens
from tests.support.profiles import is_all, only_in_all
from tests.support.rig import CPU, compiled

SHAPE = ModelConfig(
    vocab_size=211,
    hidden_size=64,
    intermediate_size=72,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    qk_norm="head",
    experts=ExpertsConfig(count=12, per_token=3, size=40, shared_size=24, dense_layers=(1,)),
)
NEW_TOKENS = 24 if is_all() else 14
SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0.0, "logprobs": 2},
    {"temperature": 1.0, "logprobs": 0},
    {"temperature": 0.8, "top_k": 12, "top_p": 0.9},
    {"temperature": 0.0, "frequency_penalty": 0.7},
    {"temperature": 0.0},
]
POLICIES: dict[str, dict[str, Any]] = {
    "window": {"kv": {"policy": "window", "budget": 16, "sink": 4}},
    "window, int8 drafts": {"kv": {"policy": "window", "budget": 16, "sink": 4}},
    "verified": {"kv": {"policy": "verified", "budget": 16, "sink": 4}},
}


@cache
def model(dtype: torch.dtype, weights: str = "dense", drafts: str | None = None) -> DecoderModel:
    return random_model(SHAPE, 1, dtype, CPU, Group.single(), compiled(), WeightChoice(weights, drafts))


def requests() -> list[AddRequest]:
    """Prompts of 1 to 61 tokens; rows leave at different times."""
    return [
        AddRequest(
            str(i),
            [2 + (7 * j + 3 * i) % 209 for j in range(1 + 15 * i)],
            SamplingParams(max_tokens=NEW_TOKENS + 6 * i, seed=i, ignore_eos=True, **sampling),
        )
        for i, sampling in enumerate(SAMPLING)
    ]


def told(outputs: list[RequestOutput]) -> tuple[list[int], list[tuple[float, ...]]]:
    """Tokens, and their log-probabilities."""
    said = [at for output in outputs for at in output.logprobs or ()]
    return tokens(outputs), [(at.logprob, *at.top_logprobs) for at in said]


@cache
def alone(dtype: torch.dtype, weights: str) -> dict[str, tuple[list[int], list[tuple[float, ...]]]]:
    """Each request by itself, without speculation."""
    engine = tiny_engine(model(dtype, weights), gamma=0)
    return {each.id: told(run(engine, [each])[each.id]) for each in requests()}


CASES = [*(("window", gamma) for gamma in range(5)), ("window, int8 drafts", 3), ("verified", 1), ("verified", 4)]
FAST = {(torch.bfloat16, "window", 1), (torch.bfloat16, "window, int8 drafts", 3), (torch.bfloat16, "verified", 4)}
FAST |= {(torch.float32, "window", 3)}


@pytest.mark.parametrize(
    ("dtype", "policy", "gamma"),
    [
        case if case in FAST else only_in_all(*case)
        for case in ((dtype, *case) for dtype in (torch.bfloat16, torch.float32) for case in CASES)
    ],
    ids=str,
)
def test_speculation_never_changes_text(policy: str, gamma: int, dtype: torch.dtype) -> None:
    check(dtype, "dense", gamma, policy)


@pytest.mark.parametrize("weights", ["int4", "int8", "fp8"])
def test_nor_that_of_experts_of_few_bits(weights: str) -> None:
    check(torch.bfloat16, weights, 3, "window")


def check(dtype: torch.dtype, weights: str, gamma: int, policy: str) -> None:
    drafts = "int8" if "int8" in policy else None
    engine = tiny_engine(model(dtype, weights, drafts), gamma=gamma, speculation=POLICIES[policy])
    outputs = run(engine, requests())
    assert {id: told(each) for id, each in outputs.items()} == alone(dtype, weights)
    if gamma:
        stats = engine.stats()
        assert stats.accepted_tokens > 0
        assert stats.rejections > 0, "the draft was never wrong: nothing was shown"
