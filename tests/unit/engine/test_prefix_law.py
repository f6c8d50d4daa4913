"""Output with the prefix cache equals output without, whatever is shared, branched, edited, aborted or evicted."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.core import Engine
from engine.messages import AddRequest, RequestOutput
from engine.oom import OutOfMemory
from engine.params import SamplingParams
from engine.plan import RoundPlan, RoundResult
from engine.worker.worker import noop
from models.config import ModelConfig
from models.llama import Llama
from models.loader import random_model
from parallel.group import Group
from tests.support.conversations import Played, Turn, check_answers, check_hits, crowd, play, random_turns
from tests.support.engines import Scripted, run, tiny_engine, tiny_model, tokens
from tests.support.profiles import examples, only_in_all
from tests.support.rig import CPU, compiled
from tests.support.workloads import SAMPLING, kv_of, prompt_of

MAX_LEN, PAGES = 150, 600
OWN_QUERIES = 6
"""Tokens at the end of a prompt that SnapKV's rows compute themselves, as set by kv_of."""
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
    max_position_embeddings=512,
    eos_token_ids=(1,),
)


@cache
def model(dtype: torch.dtype = torch.float64) -> Llama:
    return tiny_model(dtype=dtype)


@cache
def model_on_kernels(dtype: torch.dtype) -> Llama:
    return random_model(ON_KERNELS, 1, dtype, CPU, Group.single(), compiled())


@cache
def plain(target: Llama) -> Engine:
    """The engine whose answers are the reference: no prefix cache, no speculation, no lack of pages."""
    settings: dict[str, Any] = {"cache": {"prefix": False, "num_pages": PAGES}, "max_model_len": 300}
    return tiny_engine(target, gamma=0, page_size=16, scheduler={"max_rows": 16}, **settings)


def reference(target: Llama, played: Played) -> dict[str, list[RequestOutput]]:
    engine = plain(target)
    found = run(engine, played.requests)
    assert not any(output.cached_tokens for outputs in found.values() for output in outputs)
    stats = engine.stats()
    assert stats.prefix_queries == stats.prefix_hits == stats.pages_cached == 0
    return found


def cached_engine(
    target: Llama,
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


def check(
    target: Llama, engine: Engine, seed: int, page_size: int, count: int, max_len: int, *, exact: bool = False
) -> Played:
    """Play a random load. In a pool for not much more than one request, rows preempt each other from the start."""
    turns = random_turns(random.Random(seed), page_size, count)
    if engine.stats().pages_total < PAGES:
        turns = crowd(3, 60) + turns
    played = play(engine, turns, max_len)
    check_answers(played, reference(target, played), exact=exact)
    check_hits(engine, played)
    return played


# -- the law -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drafter", ["self", "model"])
@given(
    seed=st.integers(0, 2**32),
    page_size=st.sampled_from([1, 3, 4, 16]),
    gamma=st.sampled_from([0, 3]),
    varying=st.booleans(),
    policy=st.sampled_from(["window", "snapkv", "topk", "all"]),
    batch_tokens=st.sampled_from([7, 20, 64]),
    count=st.integers(1, 12),
)
@examples(6, 80)
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
        *(("self", 1), ("model", 3), ("self", 4)),
        *(only_in_all(*each) for each in (("model", 1), ("self", 3), ("model", 4), ("self", 16))),
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
    check(model(), engine, page_size, page_size, 16, longest)
    stats = engine.stats()
    assert stats.preemptions > 0
    assert stats.prefix_evictions > 0
    assert stats.prefix_hits > 0


@given(
    seed=st.integers(0, 2**32),
    page_size=st.sampled_from([1, 3, 4]),
    gamma=st.sampled_from([0, 3]),
    policy=st.sampled_from(["window", "snapkv", "topk"]),
    spare=st.integers(0, 12),
)
@examples(3, 60)
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
    check(model(), engine, seed, page_size, 8, longest)


def trouble(engine: Engine, rng: random.Random) -> Counter[str]:
    """Let rounds of an engine end early: before they begin or when their KV is written, by Ctrl-C or for lack of
    memory. And reset the prefix cache now and then. Returns the counts of what happened."""
    happened: Counter[str] = Counter()
    execute, step = engine._worker.execute, engine.step

    def execute_or_fail(plan: RoundPlan, meanwhile: Callable[[], None] = noop) -> RoundResult:
        kind = rng.choices(["", "lost", "cut short", "no memory"], [80, 8, 8, 6])[0]
        happened[kind] += 1
        if kind == "lost":
            raise KeyboardInterrupt
        result = execute(plan, meanwhile)
        if kind == "cut short":
            raise KeyboardInterrupt
        if kind == "no memory":
            raise OutOfMemory("none is left")
        return result

    def step_or_lose(meanwhile: Callable[[], None] = noop) -> list[RequestOutput]:
        if rng.random() < 0.06:
            happened["reset"] += 1
            engine.reset_prefix_cache()
        try:
            return step(meanwhile)
        except KeyboardInterrupt:
            return []

    engine._worker.execute = execute_or_fail  # type: ignore[method-assign]
    engine.step = step_or_lose  # type: ignore[method-assign]
    return happened


@pytest.mark.parametrize("drafter", ["self", "model"])
def test_nor_where_rounds_end_early_and_the_cache_is_reset(draft_dir: Path, drafter: str) -> None:
    """On CPU kernels, so that the audit compares all KV that was ever computed of the same tokens."""
    target = model_on_kernels(torch.float32)
    happened: Counter[str] = Counter()
    for page_size in (1, 3, 4):
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
    check(target, engine, 7, page_size, 14, MAX_LEN)
    assert engine.stats().prefix_hits > 0


@pytest.mark.parametrize("policy", ["window", "snapkv", only_in_all("topk"), only_in_all("all")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, only_in_all(torch.float32), only_in_all(torch.float16)], ids=str)
def test_to_the_bit_on_cpu_kernels(dtype: torch.dtype, policy: str) -> None:
    target = model_on_kernels(dtype)
    for page_size, gamma, batch_tokens in ((4, 3, 20), (16, 0, 64)):
        engine = cached_engine(
            target, page_size=page_size, gamma=gamma, varying=True, policy=policy, batch_tokens=batch_tokens
        )
        check(target, engine, page_size, page_size, 16, MAX_LEN, exact=True)
        assert engine.stats().prefix_hits > 0


@pytest.mark.parametrize("page_size", [1, 4])
def test_to_the_bit_in_a_small_pool_on_cpu_kernels(page_size: int) -> None:
    target, longest = model_on_kernels(torch.bfloat16), 90
    pages = -(-longest // page_size) + 2
    engine = cached_engine(
        target, page_size=page_size, gamma=3, varying=True, pages=pages, batch_tokens=20, max_len=longest
    )
    check(target, engine, page_size, page_size, 14, longest, exact=True)
    stats = engine.stats()
    assert min(stats.preemptions, stats.prefix_evictions, stats.prefix_hits) > 0


# -- what is found -----------------------------------------------------------------------------------------------------


def ask(engine: Engine, prompt: list[int], salt: str = "", **params: Any) -> tuple[int, list[int]]:
    """Run one request alone. Returns the number of tokens it found in the cache, and its answer."""
    before = engine.stats()
    request = AddRequest("alone", prompt, SamplingParams(**{"ignore_eos": True, **params}), cache_salt=salt)
    engine.add(request)
    outputs: list[RequestOutput] = []
    while engine.has_work():
        outputs += engine.step()
    stats, cached = engine.stats(), outputs[0].cached_tokens
    assert stats.prefix_hits - before.prefix_hits == cached
    looked_up = 0 if request.params.prompt_logprobs is not None else len(prompt)
    assert stats.prefix_queries - before.prefix_queries == looked_up
    return cached, tokens(outputs)


def whole_pages(count: int, page_size: int) -> int:
    """Tokens of `count` that lie in full pages."""
    return count // page_size * page_size


@pytest.mark.parametrize("policy", ["window", "snapkv"])
@pytest.mark.parametrize("gamma", [0, 3])
@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_a_repeated_prompt_is_found_up_to_its_last_token(page_size: int, gamma: int, policy: str) -> None:
    engine = cached_engine(model(), page_size=page_size, gamma=gamma, policy=policy)
    own = OWN_QUERIES if gamma and policy == "snapkv" else 1
    page = page_size
    for length in sorted({1, page - 1, page, page + 1, 2 * page, 5 * page, 5 * page + 1, 90} - {0}):
        prompt = prompt_of(length, 100 + length)
        assert ask(engine, prompt, max_tokens=1)[0] == 0
        for _ in range(2):
            cached, _ = ask(engine, prompt, max_tokens=1, seed=3)
            assert cached == whole_pages(max(0, length - own), page_size), length


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_drafts_do_not_change_what_is_found(page_size: int) -> None:
    """Follow-ups, branches, edits and repetitions, one after another: the same pages are found with drafts and
    without. Answers end anywhere within a round's drafts, and within pages."""
    found = []
    for gamma in (0, 3):
        engine = cached_engine(model(), page_size=page_size, gamma=gamma, max_len=300)
        hits, history = [], prompt_of(11, 1)
        for turn in range(12):
            prompt = history + prompt_of(1 + 5 * turn % 7, turn)
            cached, answer = ask(engine, prompt, max_tokens=1 + 7 * turn % 13, seed=turn)
            hits.append(cached)
            if turn:  # all of the turn before is found, except its last token, whose KV nobody has computed
                assert cached == whole_pages(len(history) - 1, page_size)
            history = prompt + answer
            if turn % 4 == 3:  # branch
                branched = history[: len(history) // 2] + prompt_of(5, 50 + turn)
                hits.append(ask(engine, branched, max_tokens=2)[0])
                assert hits[-1] == whole_pages(len(history) // 2, page_size)
            if turn % 4 == 2:  # edit
                edited = [*history[:9], 2 + (history[9] + turn) % 62, *history[10:]]  # a token never seen there
                hits.append(ask(engine, edited, max_tokens=2)[0])
                assert hits[-1] == whole_pages(9, page_size)
        found.append(hits)
    assert found[0] == found[1]


@pytest.mark.parametrize("gamma", [0, 3])
def test_salts_never_mix(gamma: int) -> None:
    engine = cached_engine(model(), page_size=4, gamma=gamma)
    prompt = prompt_of(60, 1)
    answers = []
    for salt in ("", "a", "b", "a\0", "ab"):
        cached, answer = ask(engine, prompt, salt, temperature=0)
        assert cached == 0
        answers.append(answer)
    assert all(answer == answers[0] for answer in answers)
    for salt in ("ab", "", "b", "a"):
        assert ask(engine, prompt, salt, temperature=0) == (56, answers[0])


def test_salts_never_mix_while_they_run() -> None:
    engine = cached_engine(model(), page_size=4)
    turns = [Turn(str(i), prompt_of(60, 1), salt=str(i), wait=3 * i, params={"max_tokens": 30}) for i in range(4)]
    played = play(engine, turns, MAX_LEN)
    check_answers(played, reference(model(), played))
    assert engine.stats().prefix_hits == 0


@pytest.mark.parametrize("gamma", [0, 3])
@pytest.mark.parametrize("batch_tokens", [13, 40, 200])
def test_equal_prompts_at_once_are_computed_once(batch_tokens: int, gamma: int) -> None:
    """Rows that find the first prompt's pages compute the last page at most, and what a last chunk left to them."""
    engine = cached_engine(model(), page_size=4, gamma=gamma, batch_tokens=batch_tokens)
    params = {"max_tokens": 20, "temperature": 1.0, "ignore_eos": True}
    played = play(engine, [Turn("x", prompt_of(101, 5), choices=5, params=params)], MAX_LEN)
    check_answers(played, reference(model(), played))
    check_hits(engine, played)
    cached = [max(output.cached_tokens for output in outputs) for outputs in played.outputs.values()]
    assert sorted(cached)[0] == 0
    assert sorted(cached)[1] >= whole_pages(100 - min(batch_tokens, 13), 4)


def test_prompt_logprobs_are_computed_but_their_pages_are_kept() -> None:
    engine = cached_engine(model(), page_size=4)
    prompt = prompt_of(50, 3)
    assert ask(engine, prompt, prompt_logprobs=1)[0] == 0
    assert ask(engine, prompt)[0] == 48
    assert ask(engine, prompt, prompt_logprobs=1, max_tokens=0)[0] == 0
    assert ask(engine, prompt, max_tokens=1)[0] == 48


def test_an_aborted_prompt_is_found_as_far_as_it_was_computed() -> None:
    engine = cached_engine(model(), page_size=4, batch_tokens=20)
    prompt = prompt_of(90, 3)
    engine.add(AddRequest("gone", prompt, SamplingParams(max_tokens=5)))
    for _ in range(3):
        engine.step()
    engine.abort(["gone"])
    assert not engine.has_work()
    assert ask(engine, prompt)[0] == 60


@pytest.mark.parametrize("gamma", [0, 3])
def test_what_was_used_last_is_evicted_last_and_beginnings_after_ends(gamma: int) -> None:
    """Three prompts of 12 pages are cached in 40 pages, and the first one is used again. A prompt of 14 pages takes 4
    free pages and evicts 10 or 11: the second one's, the last ones first."""
    engine = cached_engine(model(), page_size=4, gamma=gamma, pages=40)
    first, second, third, fourth = (prompt_of(length, i) for i, length in enumerate((49, 49, 49, 54)))
    for prompt in (first, second, third, first):
        ask(engine, prompt, max_tokens=1)
    ask(engine, fourth, max_tokens=1)
    stats = engine.stats()
    assert 10 <= stats.prefix_evictions <= 11
    assert ask(engine, first, max_tokens=1)[0] == ask(engine, third, max_tokens=1)[0] == 48
    kept = 12 - stats.prefix_evictions
    assert ask(engine, second, max_tokens=1)[0] == 4 * kept


def test_no_cache_finds_nothing() -> None:
    engine = tiny_engine(model(), gamma=3, cache={"prefix": False})
    prompt = prompt_of(50, 3)
    params = SamplingParams(max_tokens=5, temperature=0)
    for _ in range(2):
        played = play(engine, [Turn("x", prompt, choices=3, params={"max_tokens": 5})], MAX_LEN)
        assert all(output.cached_tokens == 0 for outputs in played.outputs.values() for output in outputs)
        assert run(engine, [AddRequest("y", prompt, params)])["y"][0].cached_tokens == 0
    stats = engine.stats()
    assert stats.prefix_hits == stats.prefix_queries == stats.prefix_evictions == stats.pages_cached == 0
    assert stats.pages_free == stats.pages_total


def test_every_way_to_sample_after_a_hit() -> None:
    """Penalties and limits count the tokens of a prompt that the row has not computed."""
    engine = cached_engine(model(), page_size=4, gamma=3, max_len=300)
    turns = [
        Turn(f"{wait}{i}", prompt_of(70, 2), wait=wait, params={"max_tokens": 24, "seed": i, "logprobs": 2, **sampling})
        for wait in (0, 30)
        for i, sampling in enumerate(SAMPLING)
    ]
    played = play(engine, turns, 300)
    check_answers(played, reference(model(), played))
    check_hits(engine, played)
    assert engine.stats().prefix_hits >= 19 * 64
