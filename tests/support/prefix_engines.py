"""Engines with a prefix cache, and the engine without one whose answers are the reference."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from engine.core import Engine
from engine.messages import RequestOutput
from engine.oom import OutOfMemory
from engine.plan import RoundPlan, RoundResult
from engine.worker.worker import noop
from models.config import ModelConfig
from models.decoder import DecoderModel
from models.loader import random_model
from parallel.group import Group
from tests.support.conversations import Played
from tests.support.engines import Scripted, run, tiny_engine, tiny_model
from tests.support.rig import CPU, compiled
from tests.support.workloads import kv_of

MAX_LEN, PAGES = 150, 600
VARYING = [[0, 3, 1], [2], [0], [3, 3, 0, 1], [1, 0]]
"""Drafts of the rows, round by round."""
ON_KERNELS = ModelConfig(
    vocab_size=64,
    hidden_size=72,
    intermediate_size=90,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=4096,
    eos_token_ids=(1,),
)


@cache
def model(dtype: torch.dtype = torch.float64) -> DecoderModel:
    return tiny_model(dtype=dtype)


@cache
def model_on_kernels(dtype: torch.dtype) -> DecoderModel:
    return random_model(ON_KERNELS, 1, dtype, CPU, Group.single(), compiled())


@cache
def plain(target: DecoderModel) -> Engine:
    """The engine whose answers are the reference: no prefix cache, no speculation, no lack of pages."""
    settings: dict[str, Any] = {
        "cache": {"prefix": False, "num_pages": PAGES},
        "max_model_len": min(target.config.max_position_embeddings, 3000),
    }
    return tiny_engine(target, gamma=0, page_size=16, scheduler={"max_rows": 16}, **settings)


def reference(target: DecoderModel, played: Played) -> dict[str, list[RequestOutput]]:
    engine = plain(target)
    found = run(engine, played.requests)
    assert not any(output.cached_tokens for outputs in found.values() for output in outputs)
    stats = engine.stats()
    assert stats.prefix_queries == stats.prefix_hits == stats.pages_cached == 0
    return found


def cached_engine(
    target: DecoderModel,
    *,
    page_size: int,
    gamma: int = 0,
    varying: bool = False,
    policy: str = "window",
    draft: Path | None = None,
    pages: int = PAGES,
    batch_tokens: int = 64,
    max_rows: int = 6,
    max_len: int = MAX_LEN,
) -> Engine:
    """Build an engine with a prefix cache. draft: directory of a draft model. varying: gamma differs from row to row
    and from round to round."""
    speculation: dict[str, Any] = {"kv": kv_of(policy, page_size, 3)}
    if draft is not None and gamma:
        speculation |= {"drafter": "model", "model": str(draft)}
    engine = tiny_engine(
        target,
        gamma=gamma,
        page_size=page_size,
        speculation=speculation,
        cache={"prefix": True, "num_pages": pages},
        scheduler={"max_rows": max_rows, "max_batch_tokens": batch_tokens},
        max_model_len=max_len,
    )
    if varying and gamma:
        engine._scheduler.controller = Scripted(VARYING * 400)
    return engine


def trouble(engine: Engine, rng: random.Random) -> Counter[str]:
    """Let rounds of an engine end early: before they begin or when their KV is written, by Ctrl-C or for lack of
    memory. And reset the prefix cache now and then, during rounds and between them. Returns what happened in rounds."""
    happened: Counter[str] = Counter()
    execute, step = engine._worker.execute, engine.step

    def execute_or_fail(plan: RoundPlan, meanwhile: Callable[[], None] = noop) -> RoundResult:
        kind = rng.choices(["", "lost", "cut short", "no memory", "reset"], [80, 8, 8, 6, 4])[0]
        happened[kind] += 1
        if kind == "lost":
            raise KeyboardInterrupt
        result = execute(plan, meanwhile)
        if kind == "cut short":
            raise KeyboardInterrupt
        if kind == "no memory":
            raise OutOfMemory("none is left")
        if kind == "reset":
            engine.reset_prefix_cache()
        return result

    def step_or_lose(meanwhile: Callable[[], None] = noop) -> list[RequestOutput]:
        if rng.random() < 0.04:
            engine.reset_prefix_cache()
        try:
            return step(meanwhile)
        except KeyboardInterrupt:
            return []

    engine._worker.execute = execute_or_fail  # type: ignore[method-assign]
    engine.step = step_or_lose  # type: ignore[method-assign]
    return happened
