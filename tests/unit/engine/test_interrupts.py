"""A round cut short, by Ctrl-C or by a fault, beside an open stream: the stream goes on with the same text, or ends
with an error."""

from __future__ import annotations

import contextlib
import random
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import core
from engine.batch.runner import Runner
from engine.llm import LLM, RequestFailed
from engine.messages import AddRequest
from engine.params import SamplingParams
from engine.scheduler.kv_manager import KVManager
from engine.scheduler.pages import PageAllocator
from engine.scheduler.request import Request
from engine.scheduler.scheduler import Scheduler
from engine.scheduler.validation import RequestError
from engine.text import TextStream
from models.decoder import DecoderModel
from tests.support.engines import TINY, tiny_model
from tests.support.profiles import examples, is_all
from tests.support.tiny import TOKENS

STREAMED = SamplingParams(max_tokens=60 if is_all() else 24, temperature=1.0, seed=3, ignore_eos=True)
BESIDE = SamplingParams(max_tokens=40, temperature=1.0, seed=9, ignore_eos=True)
PROMPTS = [[5 + i, 9, 40 - i] for i in range(4)]


@pytest.fixture(scope="module")
def model() -> DecoderModel:
    return tiny_model(config=replace(TINY, vocab_size=TOKENS, eos_token_ids=(2,)))


@pytest.fixture
def llm(tokenizer_dir: Path, model: DecoderModel) -> Iterator[LLM]:
    settings: dict[str, Any] = {"speculation": {"gamma": 2, "kv": {"budget": 16, "sink": 4}}, "cache": {"page_size": 4}}
    with LLM(str(tokenizer_dir), loaded=model, max_model_len=128, check_invariants=True, **settings) as made:
        yield made


@pytest.fixture(scope="module")
def expected(tokenizer_dir: Path, model: DecoderModel) -> list[int]:
    with LLM(str(tokenizer_dir), loaded=model, max_model_len=128, speculation={"gamma": 0}) as plain:
        return plain.generate([7, 8, 9], STREAMED)[0].token_ids


def check_stream(llm: LLM, expected: list[int], interrupted: Any) -> bool:
    """Call `interrupted` while a stream is open. Returns whether the stream went on."""
    stream = llm.stream([7, 8, 9], STREAMED)
    got = next(stream).token_ids[:]
    interrupted()
    errors: list[str] = []
    try:
        for piece in stream:
            got += piece.token_ids
    except RequestFailed as error:
        errors.append(str(error))
    assert got == expected[: len(got)]
    assert all(error.startswith("a round was cut short by ") for error in errors)
    assert errors or len(got) == len(expected)
    # Nothing is left of it.
    assert llm.generate([7, 8, 9], STREAMED)[0].token_ids == expected
    assert llm.stats.pages_free + llm.stats.pages_cached == llm.stats.pages_total
    assert llm.stats.running == llm.stats.waiting == 0
    return not errors


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs timers of the system")
def test_interrupts_at_any_time(llm: LLM, expected: list[int]) -> None:
    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    rng = random.Random(0)

    def interrupted() -> None:
        try:
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.0002, 0.05))
            llm.generate(PROMPTS, BESIDE)
        except KeyboardInterrupt:
            pass
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        went_on = [check_stream(llm, expected, interrupted) for _ in range(400 if is_all() else 8)]
    finally:
        signal.signal(signal.SIGALRM, before)
    assert sum(went_on) > len(went_on) / 2


PLACES: list[tuple[Any, str]] = [
    (Scheduler, "schedule"),
    (Scheduler, "_admit"),
    (Scheduler, "commit"),
    (Scheduler, "_release_row"),
    (KVManager, "admit"),
    (KVManager, "commit"),
    (PageAllocator, "reserve"),
    (PageAllocator, "release"),
    (Request, "commit"),
    (Runner, "forward"),
    (core, "make_output"),
    (TextStream, "take"),
]


@given(place=st.sampled_from(PLACES), after=st.booleans(), call=st.integers(0, 12))
@examples(10, 400)
def test_faults_at_any_place(
    tokenizer_dir: Path, model: DecoderModel, expected: list[int], place: tuple[Any, str], after: bool, call: int
) -> None:
    """after: whether the work of the place is done before the fault."""
    owner, name = place
    original = getattr(owner, name)
    calls = iter(range(1000))

    def faulty(*arguments: Any) -> Any:
        found = original(*arguments) if after else None
        if next(calls) == call:
            raise ZeroDivisionError("on purpose")
        return found if after else original(*arguments)

    def interrupted() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, faulty)
            with contextlib.suppress(ZeroDivisionError):
                offline.generate(PROMPTS, BESIDE)

    settings: dict[str, Any] = {"speculation": {"gamma": 2, "kv": {"budget": 16, "sink": 4}}, "cache": {"page_size": 4}}
    with LLM(str(tokenizer_dir), loaded=model, max_model_len=128, **settings) as offline:
        went_on = check_stream(offline, expected, interrupted)
    assert went_on or place != (Runner, "forward")


def test_closing_ends_open_streams(tokenizer_dir: Path, model: DecoderModel) -> None:
    with LLM(str(tokenizer_dir), loaded=model, max_model_len=128) as closed:
        stream = closed.stream([7, 8, 9], STREAMED)
        next(stream)
    with pytest.raises(RequestFailed, match="the engine was closed"):
        list(stream)
    with pytest.raises(RequestFailed, match="the engine was closed"):
        closed.generate([7, 8, 9])


def test_an_interrupt_while_queueing_leaves_nothing(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    add = llm.engine.add

    def interrupted(request: AddRequest) -> None:
        add(request)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS, BESIDE)
    assert llm.stats.running == llm.stats.waiting == 0


def test_words_without_tokens_are_refused_before_anything_runs(llm: LLM, expected: list[int]) -> None:
    def refused() -> None:
        with pytest.raises(RequestError, match="a word has no tokens"):
            llm.generate(PROMPTS, SamplingParams(bad_words=((),)))

    assert check_stream(llm, expected, refused)
