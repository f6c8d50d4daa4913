"""Sliding layers on CPU kernels: text and log-probabilities do not depend on drafts, chunks, prefix hits or other rows,
to the bit, in float32 and bfloat16."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from engine.core import Engine
from engine.messages import AddRequest, RequestOutput
from kernels.kv.kv_bits import SEALED_GROUP
from models.decoder import DecoderModel
from models.files.rope_config import RopeConfig
from models.loader import random_model
from models.model_config import ExpertsConfig, ModelConfig, WeightNames
from parallel.group import Group
from parallel.matrix_layer import WeightChoice
from tests.support.conversations import Turn, check_answers, check_hits, crowd, play, random_turns
from tests.support.engines import TINY, Scripted, run, tiny_engine
from tests.support.prefix_engines import VARYING, trouble
from tests.support.profiles import is_all, only_in_all
from tests.support.rig import CPU, compiled
from tests.support.workloads import kv_of

WINDOW, LONGEST = 24, 5 * SEALED_GROUP
GEMMA = replace(
    TINY,
    hidden_size=64,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    qk_norm="head",
    activation="gelu_tanh",
    norms_from_one=True,
    tie_word_embeddings=True,
    embedding_scale=8.0,
    attention_scale=0.3,
    sliding_window=WINDOW,
    sliding_layers=(0, 2),
    sliding_rope=RopeConfig(theta=100.0),
    names=WeightNames(
        after_attention="post_attention_layernorm",
        before_mlp="pre_feedforward_layernorm",
        after_mlp="post_feedforward_layernorm",
    ),
)
SHAPES: dict[str, ModelConfig] = {
    "most layers": GEMMA,
    "all layers": replace(
        TINY, hidden_size=64, num_heads=3, num_kv_heads=1, head_dim=64, sliding_window=WINDOW, sliding_layers=(0, 1)
    ),
    "experts": replace(
        TINY,
        hidden_size=64,
        num_heads=4,
        head_dim=16,
        sliding_window=WINDOW,
        sliding_layers=(1,),
        unrotated_layers=(0,),
        experts=ExpertsConfig(count=6, per_token=2, size=40),
    ),
}
POLICIES = {
    "most layers": ["window", "all", "quest", "snapkv", "verified"],
    "all layers": ["window", "all", "quest", "topk", "snapkv", "relative"],
    "experts": ["window", "quest"],
}
CHUNKS = [9, 20, 33, 64, 100, 257]
DTYPES = [torch.float32, torch.bfloat16]


@cache
def target(layers: str, dtype: torch.dtype, weights: str = "dense") -> DecoderModel:
    return random_model(SHAPES[layers], 1, dtype, CPU, Group.single(), compiled(), WeightChoice(weights, "int8"))


def engine_of(model: DecoderModel, gamma: int, policy: str = "all", page_size: int = 16, **settings: Any) -> Engine:
    kv = kv_of(policy, page_size, 1 if page_size < SEALED_GROUP else 0)
    return tiny_engine(
        model,
        gamma=gamma,
        page_size=page_size,
        speculation={"kv": kv} | settings.pop("speculation", {}),
        cache={"num_pages": 200, "memory_gb": None} | settings.pop("cache", {}),
        scheduler={"max_rows": 6} | settings.pop("scheduler", {}),
        max_model_len=LONGEST,
        **settings,
    )


def alone(
    model: DecoderModel, requests: Sequence[AddRequest], kv_format: str = "dense"
) -> dict[str, list[RequestOutput]]:
    """Answer each request by itself, its prompt in one chunk, without drafts and prefix cache."""
    page = SEALED_GROUP if kv_format in ("int8", "int4x2") else 16
    settings: dict[str, Any] = {"cache": {"prefix": False, "format": kv_format}}
    engine = engine_of(model, 0, page_size=page, scheduler={"max_batch_tokens": LONGEST}, **settings)
    return {request.id: run(engine, [request])[request.id] for request in requests}


def prompt(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(2, 64), k=length)


PARAMS = {"max_tokens": 16 if is_all() else 12, "ignore_eos": True, "logprobs": 2}
TURNS = [
    Turn("scored", prompt(70, 5), params=PARAMS | {"prompt_logprobs": 1}),
    Turn("greedy", prompt(130, 1), params=PARAMS),
    Turn("sampled", prompt(90, 2), params=PARAMS | {"temperature": 1.0, "seed": 3}, wait=2),
    Turn("short", prompt(1, 3), params=PARAMS | {"temperature": 0.8, "top_k": 12, "seed": 4, "max_tokens": 45}),
    Turn("again", prompt(9, 4), after="greedy", params=PARAMS),
    Turn("branch", prompt(130, 1)[:99] + prompt(9, 6), wait=20, params=PARAMS | {"temperature": 1.0, "seed": 5}),
    Turn("longer", prompt(30, 7), after="branch", params=PARAMS | {"frequency_penalty": 0.7}),
]


# -- the law ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "dtype"),
    [
        *(("most layers", torch.bfloat16), ("all layers", torch.float32), ("experts", torch.bfloat16)),
        *(only_in_all("all layers", torch.bfloat16), only_in_all("most layers", torch.float32)),
        only_in_all("experts", torch.float32),
    ],
    ids=str,
)
def test_no_policy_changes_a_bit(layers: str, dtype: torch.dtype) -> None:
    """Rows far longer than window and budget; prompts come in chunks, or are found in the prefix cache."""
    model, rejections = target(layers, dtype), 0
    reference: dict[str, list[RequestOutput]] = {}
    drafters = ("self", "together") if dtype == torch.float32 else ("together", "self")
    policies = POLICIES[layers] if is_all() else POLICIES[layers][layers == "all layers" :: 2]
    for turn, policy in enumerate(["", *policies]):
        gamma, drafter = 1 + turn % 4 if policy else 0, drafters[turn % 2]
        settings: dict[str, Any] = {"scheduler": {"max_batch_tokens": CHUNKS[turn % len(CHUNKS)]}}
        engine = engine_of(model, gamma, policy or "all", speculation={"drafter": drafter}, **settings)
        played = play(engine, TURNS, LONGEST)
        reference = reference or alone(model, played.requests)
        check_answers(played, reference, exact=True)
        check_hits(engine, played)
        stats = engine.stats()
        assert stats.prefix_hits >= 2 * 80
        assert (stats.accepted_tokens > 10) == bool(policy)
        rejections += stats.rejections
    assert rejections > (25 if is_all() else 8), "drafts were hardly ever wrong: nothing was shown"


@pytest.mark.parametrize(
    ("kv_format", "dtype", "layers"),
    [
        *(("int8", torch.float32, "most layers"), ("int4x2", torch.bfloat16, "all layers")),
        *(only_in_all("int8", torch.float32, "all layers"), only_in_all("int4x2", torch.bfloat16, "most layers")),
        *(only_in_all("int8", torch.bfloat16, layers) for layers in ("most layers", "all layers")),
        *(only_in_all("int4x2", torch.float32, layers) for layers in ("most layers", "all layers")),
    ],
    ids=str,
)
def test_nor_does_any_policy_over_sealed_pages(layers: str, kv_format: str, dtype: torch.dtype) -> None:
    """Sliding layers are dense. Where all layers slide, they have the format."""
    model, reference = target(layers, dtype), dict[str, list[RequestOutput]]()
    for gamma, policy, chunk in ((4, "window", 100), (3, "quest", 40)):
        settings: dict[str, Any] = {"cache": {"format": kv_format}, "scheduler": {"max_batch_tokens": chunk}}
        engine = engine_of(model, gamma, policy, SEALED_GROUP, **settings)
        played = play(engine, TURNS, LONGEST)
        reference = reference or alone(model, played.requests, kv_format)
        check_answers(played, reference, exact=True)
        check_hits(engine, played)
        assert engine.stats().prefix_hits >= SEALED_GROUP
        assert engine.stats().accepted_tokens > 10


@pytest.mark.parametrize("weights", [only_in_all("int8"), "int4"])
def test_nor_do_weights_of_few_bits(weights: str) -> None:
    model = target("most layers", torch.bfloat16, weights)
    engine = engine_of(model, 3, "window", scheduler={"max_batch_tokens": 33})
    played = play(engine, TURNS, LONGEST)
    check_answers(played, alone(model, played.requests), exact=True)


@pytest.mark.parametrize(
    ("layers", "page_size", "seed"),
    [
        ("most layers", 16, 1),
        ("all layers", 8, 2),
        *(only_in_all(layers, 3, seed) for layers in SHAPES for seed in range(3, 9)),
    ],
)
def test_nor_does_trouble(layers: str, page_size: int, seed: int) -> None:
    """Random loads with twins, branches and aborts, in pools that are too small for them; rounds are lost, the prefix
    cache is emptied, and drafts differ from row to row."""
    model, rng = target(layers, DTYPES[seed % 2]), random.Random(seed)
    settings: dict[str, Any] = {"cache": {"num_pages": LONGEST // page_size + 4}}
    engine = engine_of(model, 3, "window", page_size, scheduler={"max_batch_tokens": rng.choice(CHUNKS)}, **settings)
    engine._scheduler.controller = Scripted(VARYING * 400)
    trouble(engine, rng)
    played = play(engine, crowd(3, 60) + random_turns(rng, page_size, 8, 90), LONGEST)
    check_answers(played, alone(model, played.requests), exact=True)
