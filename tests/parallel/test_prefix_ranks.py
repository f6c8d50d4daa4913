"""The prefix cache over ranks: the same answers, the same tokens found, and equal page tables on all ranks."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.core import Engine
from engine.messages import RequestOutput
from parallel import shm
from tests.support.conversations import Played, Turn, check_answers, check_hits, crowd, play, random_turns
from tests.support.engines import Scripted, run
from tests.support.profiles import only_in_all
from tests.support.rank_law import model, ops_of
from tests.support.ranks import DRAFT, threaded_engine, write_random_model
from tests.support.workloads import kv_of

SHAPE = replace(model(9, 3), vocab_size=67)
MAX_LEN, PAGE = 150, 4
NO_CACHE = {"prefix": False, "num_pages": 400}
VARYING = [[0, 3, 1], [2], [0], [3, 3, 0, 1], [1, 0]]
COUNTS = ("preemptions", "prefix_evictions", "prefix_hits", "prefix_queries", "pages_cached", "rounds")


@pytest.fixture(scope="module")
def draft_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("models") / "draft", replace(DRAFT, vocab_size=SHAPE.vocab_size))


def start(size: int, *, gamma: int = 3, on_kernels: bool = False, share: bool = False, **settings: Any) -> Engine:
    """Start an engine that compares the row state of all ranks, and the KV of cached pages, after every round."""
    engine, _ = threaded_engine(
        SHAPE,
        size,
        gamma=gamma,
        dtype=torch.float32 if on_kernels else torch.float64,
        ops=ops_of(on_kernels),
        share=share,
        digest_every=1,
        **settings,
    )
    return engine


@cache
def plain() -> Engine:
    return start(1, gamma=0, cache=NO_CACHE)


def reference(played: Played) -> dict[str, list[RequestOutput]]:
    return run(plain(), played.requests)


def play_and_close(
    engine: Engine, seed: int, count: int, max_len: int, first: Sequence[Turn] = ()
) -> tuple[Played, list[int]]:
    """Play a random load after the turns `first`. Returns it and the engine's counts."""
    engine._scheduler.controller = Scripted(VARYING * 400)
    try:
        played = play(engine, [*first, *random_turns(random.Random(seed), PAGE, count, 40)], max_len)
        check_hits(engine, played)
        return played, [getattr(engine.stats(), name) for name in COUNTS]
    finally:
        engine.close()


def speculation(policy: str, draft_dir: Path | None, count: int | None) -> dict[str, Any]:
    """Settings of speculation by the target itself, or by a draft model on the first `count` ranks; None: on all."""
    settings: dict[str, Any] = {"gamma": 3, "kv": kv_of(policy, PAGE, 3)}
    if draft_dir is not None:
        settings |= {"drafter": "model", "model": str(draft_dir), "tensor_parallel_size": count}
    return settings


@pytest.mark.parametrize(
    ("drafter", "policy", "size", "count"),
    [
        each if each in (("self", "verified", 3, 2), ("self", "quest", 2, None)) else only_in_all(*each)
        for drafter, policies in (
            ("self", ("window", "verified", "quest", "snapkv", "topk")),
            ("model", ("window", "all", "quest", "snapkv")),
        )
        for policy in policies
        for each in ((drafter, policy, 2, None), (drafter, policy, 3, 2))
    ],
)
def test_ranks_with_a_prefix_cache_never_change_output(
    draft_dir: Path, drafter: str, policy: str, size: int, count: int | None
) -> None:
    engine = start(size, speculation=speculation(policy, draft_dir if drafter == "model" else None, count))
    played, counts = play_and_close(engine, size, 16, MAX_LEN)
    check_answers(played, reference(played))
    assert dict(zip(COUNTS, counts, strict=True))["prefix_hits"] > 0


@pytest.mark.parametrize("size", [2, only_in_all(3)])
def test_to_the_bit_on_compiled_kernels(size: int) -> None:
    engine = start(size, on_kernels=True, speculation=speculation("window", None, None))
    played, counts = play_and_close(engine, 5, 16, MAX_LEN)
    without = start(size, gamma=0, on_kernels=True, cache=NO_CACHE)
    try:
        expected = run(without, played.requests)
    finally:
        without.close()
    check_answers(played, expected, exact=True)
    assert dict(zip(COUNTS, counts, strict=True))["prefix_hits"] > 0


@pytest.mark.parametrize("drafter", [only_in_all("self"), "model"])
def test_any_number_of_ranks_finds_evicts_and_preempts_the_same(draft_dir: Path, drafter: str) -> None:
    """In a pool for little more than one request."""
    longest = 90
    found = []
    for size in (1, 2) if drafter == "model" else (1, 3):
        engine = start(
            size,
            max_model_len=longest,
            cache={"page_size": PAGE, "num_pages": -(-longest // PAGE) + 2},
            scheduler={"max_rows": 6, "max_batch_tokens": 20},
            speculation=speculation("all", draft_dir, None)
            if drafter == "model"
            else speculation("window", None, None),
        )
        played, counts = play_and_close(engine, 4, 7, longest, crowd(3, 60))
        check_answers(played, reference(played))
        found.append(counts)
    assert found[0] == found[1]
    assert min(found[0][:3]) > 0, dict(zip(COUNTS, found[0], strict=True))


@pytest.mark.skipif(not shm.available(), reason="needs shared memory between ranks")
def test_a_round_that_a_rank_abandons_leaves_the_cache_intact() -> None:
    """Now and then, memory runs out on one rank at the end of a round, when all KV of the round is written."""
    ranks = threaded_engine(
        SHAPE, 2, gamma=3, share=True, digest_every=1, speculation=speculation("window", None, None)
    )
    engine, threads = ranks
    drafter = threads.workers[1]._drafter
    drafter.observe = _failing(drafter.observe, every=9)  # type: ignore[method-assign]
    played, _ = play_and_close(engine, 3, 20, MAX_LEN)
    check_answers(played, reference(played))
    failed = [outputs[-1] for outputs in played.outputs.values() if outputs and outputs[-1].error is not None]
    assert failed
    assert max(output.cached_tokens for outputs in played.outputs.values() for output in outputs) > 0


def _failing(observe: Callable[..., None], every: int) -> Callable[..., None]:
    calls = iter(range(1 << 30))

    def observe_or_fail(*arguments: Any) -> None:
        observe(*arguments)
        if next(calls) % every == every - 1:
            raise MemoryError

    return observe_or_fail


def test_equal_prompts_at_once_are_computed_once_on_all_ranks() -> None:
    engine = start(3, speculation=speculation("window", None, None))
    try:
        turn = Turn("x", [2 + 7 * i % 59 for i in range(101)], choices=5, params={"max_tokens": 20, "ignore_eos": True})
        played = play(engine, [turn], MAX_LEN)
        check_hits(engine, played)
    finally:
        engine.close()
    check_answers(played, reference(played))
    cached = sorted(max(output.cached_tokens for output in outputs) for outputs in played.outputs.values())
    assert cached[0] == 0
    assert cached[1] >= 88
