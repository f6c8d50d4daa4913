"""Output with the prefix cache equals output without, whatever is shared, branched, edited, aborted or evicted."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.core import Engine
from engine.ngram.ngram_drafts import Proposal
from engine.scheduler.controller import RowDrafts
from engine.scheduler.request import Request
from kernels.cpu.library import SEGMENT
from models.decoder import DecoderModel
from tests.support.conversations import Turn, check_answers, check_hits, crowd, play, random_turns
from tests.support.engines import Scripted
from tests.support.prefix_engines import (
    MAX_LEN,
    PAGES,
    VARYING,
    cached_engine,
    model,
    model_on_kernels,
    reference,
    trouble,
)
from tests.support.profiles import examples, is_all, only_in_all
from tests.support.workloads import SAMPLING, prompt_of


def check(
    target: DecoderModel, engine: Engine, seed: int, page_size: int, count: int, max_len: int, *, exact: bool = False
) -> None:
    """Play a random load. In a pool for not much more than one request, rows preempt each other from the start."""
    turns = random_turns(random.Random(seed), page_size, count)
    if engine.stats().pages_total < PAGES:
        turns = crowd(3, 60) + turns
    played = play(engine, turns, max_len)
    check_answers(played, reference(target, played), exact=exact)
    check_hits(engine, played)


@pytest.mark.parametrize("drafter", ["self", "model"])
@given(
    seed=st.integers(0, 2**32),
    page_size=st.sampled_from([1, 3, 4, 16]),
    gamma=st.sampled_from([0, 3]),
    varying=st.booleans(),
    policy=st.sampled_from(["window", "verified", "quest", "snapkv", "topk", "all"]),
    batch_tokens=st.sampled_from([7, 20, 64]),
    count=st.integers(1, 12 if is_all() else 5),
)
@examples(3, 80)
def test_the_prefix_cache_never_changes_output(
    draft_dir: Path,
    drafter: str,
    seed: int,
    page_size: int,
    gamma: int,
    varying: bool,
    policy: str,
    batch_tokens: int,
    count: int,
) -> None:
    if drafter == "model" and policy == "verified":
        policy = "quest"  # a draft model has no verify passes
    engine = cached_engine(
        model(),
        page_size=page_size,
        gamma=gamma,
        varying=varying,
        policy=policy,
        draft=draft_dir if drafter == "model" else None,
        batch_tokens=batch_tokens,
    )
    check(model(), engine, seed, page_size, count, MAX_LEN)


@pytest.mark.parametrize(
    ("drafter", "page_size"),
    [
        *(("self", 4), ("model", 3)),
        *(only_in_all(*each) for each in (("self", 1), ("model", 1), ("self", 3), ("model", 4), ("self", 16))),
    ],
)
def test_nor_where_pages_are_evicted_and_rows_preempted(draft_dir: Path, drafter: str, page_size: int) -> None:
    """The pool holds little more than one request of maximum length."""
    longest = 90
    engine = cached_engine(
        model(),
        page_size=page_size,
        gamma=3,
        varying=True,
        draft=draft_dir if drafter == "model" else None,
        pages=-(-longest // page_size) + 2,
        batch_tokens=20,
        max_len=longest,
    )
    check(model(), engine, page_size, page_size, 16 if is_all() else 10, longest)
    stats = engine.stats()
    assert stats.preemptions > 0
    assert stats.prefix_evictions > 0
    assert stats.prefix_hits > 0


@given(
    seed=st.integers(0, 2**32),
    page_size=st.sampled_from([1, 3, 4]),
    gamma=st.sampled_from([0, 3]),
    policy=st.sampled_from(["window", "verified", "quest", "snapkv", "topk"]),
    spare=st.integers(0, 12),
)
@examples(2, 60)
def test_nor_in_any_small_pool(seed: int, page_size: int, gamma: int, policy: str, spare: int) -> None:
    longest = 90
    engine = cached_engine(
        model(),
        page_size=page_size,
        gamma=gamma,
        varying=True,
        policy=policy,
        pages=-(-longest // page_size) + spare,
        batch_tokens=20,
        max_len=longest,
    )
    check(model(), engine, seed, page_size, 8 if is_all() else 5, longest)


@pytest.mark.parametrize("drafter", ["self", "model"])
def test_nor_where_rounds_end_early_and_the_cache_is_reset(draft_dir: Path, drafter: str) -> None:
    """On CPU kernels, so that the audit compares all KV that was ever computed of the same tokens."""
    target = model_on_kernels(torch.float32)
    happened: Counter[str] = Counter()
    for page_size in (1, 3, 4) if is_all() else (3, 4):
        engine = cached_engine(
            target,
            page_size=page_size,
            gamma=3,
            varying=True,
            policy="all" if drafter == "model" else "window",
            draft=draft_dir if drafter == "model" else None,
            batch_tokens=20,
        )
        kinds = trouble(engine, random.Random(page_size))
        check(target, engine, page_size, page_size, 24, MAX_LEN, exact=True)
        happened += kinds
        assert engine.stats().prefix_hits > 0
    assert happened.keys() == {"", "lost", "cut short", "no memory", "reset"}


@pytest.mark.parametrize("page_size", [4, only_in_all(1), only_in_all(16)])
def test_nor_in_float32(page_size: int) -> None:
    target = model(torch.float32)
    engine = cached_engine(target, page_size=page_size, gamma=3, varying=True)
    check(target, engine, 7, page_size, 14 if is_all() else 8, MAX_LEN)
    assert engine.stats().prefix_hits > 0


@pytest.mark.parametrize(
    "policy", ["quest", "verified", *(only_in_all(each) for each in ("snapkv", "window", "topk", "all"))]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, only_in_all(torch.float32), only_in_all(torch.float16)], ids=str)
def test_to_the_bit_on_cpu_kernels(dtype: torch.dtype, policy: str) -> None:
    target = model_on_kernels(dtype)
    for page_size, gamma, batch_tokens in ((4, 3, 20), (16, 0, 64)):
        engine = cached_engine(
            target, page_size=page_size, gamma=gamma, varying=True, policy=policy, batch_tokens=batch_tokens
        )
        check(target, engine, page_size, page_size, 16 if is_all() else 8, MAX_LEN, exact=True)
        assert engine.stats().prefix_hits > 0


@pytest.mark.parametrize("page_size", [only_in_all(1), 4])
def test_to_the_bit_in_a_small_pool_on_cpu_kernels(page_size: int) -> None:
    target, longest = model_on_kernels(torch.bfloat16), 90
    pages = -(-longest // page_size) + 2
    engine = cached_engine(
        target, page_size=page_size, gamma=3, varying=True, pages=pages, batch_tokens=20, max_len=longest
    )
    check(target, engine, page_size, page_size, 14, longest, exact=True)
    stats = engine.stats()
    assert min(stats.preemptions, stats.prefix_evictions, stats.prefix_hits) > 0


class SharedTokens(Scripted):
    """Controller under which gamma varies, and that records how many tokens rows share."""

    def __init__(self) -> None:
        super().__init__(VARYING * 400)
        self.seen: list[int] = []

    def choose(
        self,
        rows: Sequence[Request],
        shared_tokens: int = 0,
        proposals: Sequence[Proposal] = (),
        share: int | None = None,
    ) -> list[RowDrafts]:
        self.seen.append(shared_tokens)
        return super().choose(rows, shared_tokens, proposals, share)


@pytest.mark.parametrize("policy", [only_in_all("window"), "all"])
@pytest.mark.parametrize("page_size", [16, only_in_all(3), only_in_all(64)])
def test_to_the_bit_where_rows_share_segments_of_attention(page_size: int, policy: str) -> None:
    """Choices, a branch in their last page, one in their second segment, one in their first, and a stranger, side by
    side."""
    target, longest = model_on_kernels(torch.bfloat16), 2400
    engine = cached_engine(
        target,
        page_size=page_size,
        gamma=3,
        policy=policy,
        pages=16 * longest // page_size,
        batch_tokens=500,
        max_rows=8,
        max_len=longest,
    )
    engine._scheduler.controller = controller = SharedTokens()
    text = prompt_of(2 * SEGMENT + 60, 1)
    params = {"max_tokens": 40 if is_all() else 24, "ignore_eos": True, "logprobs": 1}
    turns = [
        Turn("choices", text, choices=3, params=params),
        Turn("end", [*text[:-5], 3, 4, 5], choices=2, wait=8, params=params),
        Turn("middle", text[: SEGMENT + 300] + prompt_of(70, 2), wait=9, params=params | {"prompt_logprobs": 0}),
        Turn("beginning", text[:300] + prompt_of(SEGMENT, 3), wait=9, params=params),
        Turn("stranger", prompt_of(SEGMENT + 100, 4), wait=7, params=params),
    ]
    played = play(engine, turns, longest)
    check_answers(played, reference(target, played), exact=True)
    check_hits(engine, played)
    stretch = SEGMENT // page_size * page_size
    assert max(controller.seen) >= 8 * stretch  # five rows share two segments, and a sixth the first one


def test_every_way_to_sample_after_a_hit() -> None:
    """Penalties and limits count the tokens of a prompt that the row has not computed."""
    engine = cached_engine(model(), page_size=4, gamma=3, max_len=300)
    params = {"max_tokens": 24 if is_all() else 12, "logprobs": 2}
    turns = [
        Turn(f"{wait}{i}", prompt_of(70, 2), wait=wait, params=params | {"seed": i, **sampling})
        for wait in (0, 30)
        for i, sampling in enumerate(SAMPLING)
    ]
    played = play(engine, turns, 300)
    check_answers(played, reference(model(), played))
    check_hits(engine, played)
    assert engine.stats().prefix_hits >= 19 * 64
