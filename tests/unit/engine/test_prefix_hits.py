"""Tokens that the prefix cache finds, and those it must not find."""

from __future__ import annotations

from typing import Any

import pytest

from engine.core import Engine
from engine.messages import AddRequest, RequestOutput
from engine.params import SamplingParams
from tests.support.conversations import Turn, check_answers, check_hits, play
from tests.support.engines import run, tiny_engine, tokens
from tests.support.prefix_engines import MAX_LEN, cached_engine, model, reference
from tests.support.profiles import only_in_all
from tests.support.workloads import prompt_of

OWN_QUERIES = 6
"""Tokens at the end of a prompt that SnapKV's rows compute themselves, as set by kv_of."""


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


@pytest.mark.parametrize("policy", [only_in_all("window"), "verified", only_in_all("quest"), "snapkv"])
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


@pytest.mark.parametrize("page_size", [1, only_in_all(4), 16])
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
def test_the_last_token_of_an_answer_is_not_found(gamma: int) -> None:
    """Nor where it is a stop token among accepted drafts, whose KV was computed with theirs."""
    for length in (20, 23):
        prompt = prompt_of(length, 1)
        sampling: dict[str, Any] = {"temperature": 1.0, "seed": 5}
        engine = cached_engine(model(), page_size=1, gamma=gamma, policy="all")
        _, answer = ask(engine, prompt, "other", max_tokens=12, **sampling)
        stop = next(token for at, token in enumerate(answer) if at > 4 and token not in answer[:at])
        _, stopped = ask(engine, prompt, max_tokens=12, stop_token_ids=(stop,), **sampling)
        assert stopped == answer[: answer.index(stop) + 1]
        history = prompt + stopped
        assert ask(engine, [*history, 2, 3], max_tokens=1)[0] == len(history) - 1
        if gamma:
            assert engine.stats().accepted_tokens > 0


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
