"""What goes wrong for one request ends that request: with an error that names the cause, and no other."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.core import Engine
from engine.messages import AddRequest, RequestOutput
from engine.params import SamplingParams
from engine.sampling import grammar
from engine.sampling.grammar import Grammars
from engine.sampling.logits_processors import LogitEdits, TokenCounts
from engine.scheduler.validation import RequestError
from engine.speculation.drafters import SelfDrafter
from models.tokenizer import Tokenizer
from parallel import shm
from tests.support.engines import TINY, run, tiny_engine, tiny_model, tokens
from tests.support.profiles import examples, is_all, only_in_all
from tests.support.ranks import threaded_engine
from tests.support.tiny import TOKENS

SHAPE = replace(TINY, vocab_size=TOKENS, eos_token_ids=(2,))
EVERY = tuple(range(TOKENS))
NEW_TOKENS = 24 if is_all() else 14


@pytest.fixture(scope="module")
def reference(tokenizer_dir: Path) -> dict[str, list[int]]:
    return {id: tokens(out) for id, out in run(engine_of(tokenizer_dir, 1, 0), requests()).items()}


def engine_of(tokenizer_dir: Path, size: int, gamma: int) -> Engine:
    if size > 1 and not shm.available():
        pytest.skip("needs shared memory between ranks")
    settings: dict[str, Any] = {"model": str(tokenizer_dir), "max_model_len": 200, "digest_every": 1}
    return threaded_engine(SHAPE, size, gamma=gamma, share=size > 1, **settings)[0]


def requests() -> list[AddRequest]:
    """Requests that use every kind of host code that runs for one row."""
    kinds: list[dict[str, Any]] = [
        {},
        {"grammar": 'start: /[a-z ]+/ "." /[0-9]+/', "temperature": 1.3},
        {"bad_words": ((5,), (7, 8)), "temperature": 1.0},
        {"presence_penalty": 1.0, "repetition_penalty": 1.2},
        {"allowed_token_ids": tuple(range(3, 90)), "min_tokens": 4, "temperature": 0.8},
        {"logit_bias": {9: 5.0}, "grammar": 'start: ("yes" | "no" | /[a-z]{8}/)', "temperature": 1.0},
    ]
    return [
        AddRequest(
            str(i),
            [3 + (7 * j + i) % 300 for j in range(1 + 9 * i)],
            SamplingParams(max_tokens=NEW_TOKENS, seed=i, **kind),
        )
        for i, kind in enumerate([*kinds, *kinds] if is_all() else [*kinds, kinds[1]])
    ]


# -- faults in host code that runs for one row -------------------------------------------------------------------------

HOOKS: list[tuple[Any, str]] = [
    (Grammars, "_compile"),
    (grammar, "_advance"),
    (Grammars, "_fill"),
    (LogitEdits, "apply"),
    (LogitEdits, "from_row_start"),
    (TokenCounts, "start"),
    (SelfDrafter, "start"),
]


class Fault(Exception):
    pass


@contextmanager
def faults(fail: Callable[[], bool], hooks: list[tuple[Any, str]]) -> Iterator[list[str]]:
    """Let these methods raise whenever `fail` says so. Yields the names of those that did."""
    raised: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in hooks:
            original = getattr(owner, name)
            kind = owner.__dict__[name]

            def faulty(*arguments: Any, original: Any = original, name: str = name, **others: Any) -> Any:
                if fail():
                    raised.append(name)
                    raise Fault("on purpose")
                return original(*arguments, **others)

            patch.setattr(owner, name, staticmethod(faulty) if isinstance(kind, classmethod) else faulty)
        yield raised


def check_outputs(outputs: dict[str, list[RequestOutput]], reference: dict[str, list[int]]) -> int:
    """Check that texts are those of the reference, or begin like them and end with an error. Returns the number of
    errors."""
    failed = 0
    for id, out in outputs.items():
        text = tokens(out)
        if out[-1].error is None:
            assert text == reference[id]
        else:
            assert text == reference[id][: len(text)]
            assert out[-1].finish_reason == "abort"
            assert out[-1].is_server_fault
            failed += 1
    return failed


@pytest.mark.parametrize("size", [1, 2])
@given(seed=st.integers(0, 2**32), gamma=st.sampled_from([0, 3]), hooks=st.sets(st.sampled_from(HOOKS), min_size=1))
@examples(3, 100)
def test_a_fault_fails_its_own_request(
    tokenizer_dir: Path, reference: dict[str, list[int]], size: int, seed: int, gamma: int, hooks: set[tuple[Any, str]]
) -> None:
    """With several ranks each of them fails by itself: one rank's fault is the request's on all ranks."""
    rng = random.Random(seed)
    engine = engine_of(tokenizer_dir, size, gamma)
    try:
        with faults(lambda: rng.random() < 0.03, sorted(hooks, key=str)) as raised:
            failed = check_outputs(run(engine, requests()), reference)
        assert (failed > 0) <= (len(raised) > 0)
        assert check_outputs(run(engine, requests()), reference) == 0  # nothing is left of it
    finally:
        engine.close()


@pytest.mark.parametrize("size", [only_in_all(1), 2])
@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: f"{hook[0].__name__}.{hook[1]}")
def test_a_fault_is_named(
    tokenizer_dir: Path, reference: dict[str, list[int]], size: int, hook: tuple[Any, str]
) -> None:
    """A hook that always fails ends each request that uses it, and only those."""
    engine = engine_of(tokenizer_dir, size, 2)
    try:
        with faults(lambda: True, [hook]):
            outputs = run(engine, requests())
        assert 0 < check_outputs(outputs, reference) < len(outputs) or hook[0] is SelfDrafter
        errors = {out[-1].error for out in outputs.values() if out[-1].error is not None}
        assert all(error is not None and error.endswith("failed: Fault: on purpose") for error in errors)
    finally:
        engine.close()


def test_memory_is_not_a_rows_fault(tokenizer_dir: Path) -> None:
    engine = engine_of(tokenizer_dir, 1, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LogitEdits, "apply", lambda *_: torch.empty(1 << 60, dtype=torch.uint8))
        outputs = run(engine, requests())
    assert {out[-1].retry for out in outputs.values()} >= {"out_of_memory"}


# -- logits that are not numbers, and vocabularies of which nothing is left --------------------------------------------


@pytest.mark.parametrize(
    ("gamma", "bad", "size"),
    [
        case if case in ((0, math.inf, 1), (3, math.nan, 2)) else only_in_all(*case)
        for case in product((0, 3), (math.nan, math.inf), (1, 2))
    ],
)
def test_logits_that_are_not_finite_fail_the_request(size: int, bad: float, gamma: int) -> None:
    """Of the rows of a batch, those whose context holds a token with a broken embedding."""
    engine, ranks = threaded_engine(SHAPE, size, gamma=gamma, share=size > 1)
    common: dict[str, Any] = {"max_tokens": 20, "logit_bias": {300: -100.0}}  # only prompts hold that token
    healthy = [AddRequest(str(i), [5, 6, 7 + i], SamplingParams(seed=i, temperature=i / 2, **common)) for i in range(4)]
    plain = run(engine, healthy)
    for model in (engine._worker.model, *(worker.model for worker in ranks.workers.values())):
        if model.vocab_start <= 300 < model.vocab_start + model.vocab_size:
            model._embedding.weight[300 - model.vocab_start] = bad
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0},
        {"temperature": 1.0, "top_p": 0.5},
        {"top_k": 3, "temperature": 2.0},
    ]
    sick = [
        AddRequest(f"sick {i}", [5, 300, 7], SamplingParams(logprobs=2, **common, **kind))
        for i, kind in enumerate(kinds)
    ]
    score = SamplingParams(max_tokens=0, prompt_logprobs=1)  # nothing is sampled
    sick.append(AddRequest("score", [5, 300, 7, 8], score))
    healthy.append(AddRequest("other", [5, 6, 7, 8], score))
    plain["other"] = []
    outputs = run(engine, [*healthy, *sick])
    engine.close()
    for request in sick:
        (output,) = outputs[request.id]
        assert output.error is not None
        assert "not a finite number" in output.error
        assert output.is_server_fault
    for request in healthy:
        assert tokens(outputs[request.id]) == tokens(plain[request.id])
        assert outputs[request.id][-1].error is None


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"allowed_token_ids": (5, 6), "bad_words": ((5,), (6,))}, "bad_words and allowed_token_ids"),
        ({"allowed_token_ids": (2,), "min_tokens": 3}, "min_tokens and allowed_token_ids"),
        ({"stop_token_ids": EVERY, "min_tokens": 3}, "min_tokens"),
        ({"bad_words": tuple((token,) for token in EVERY)}, "bad_words"),
        ({"bad_words": ((),)}, "a word has no tokens"),
    ],
)
def test_fields_that_exclude_every_token_are_refused(tokenizer_dir: Path, fields: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        engine_of(tokenizer_dir, 1, 0).check(AddRequest("0", [5], SamplingParams(max_tokens=10, **fields)))


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("gamma", [0, 3])
def test_fields_that_exclude_every_token_later_end_the_request(tokenizer_dir: Path, size: int, gamma: int) -> None:
    """What a grammar allows is known only while it is matched. Nothing gives way: min_tokens is kept."""
    engine = engine_of(tokenizer_dir, size, gamma)
    spelt = tuple(Tokenizer(tokenizer_dir).encode("no"))
    cases: dict[str, tuple[dict[str, Any], str]] = {
        "min_tokens": ({"min_tokens": 20}, "no"),
        "allowed_token_ids": ({"allowed_token_ids": (9,)}, ""),
        "bad_words": ({"bad_words": ((spelt[0],),)}, ""),
    }
    params = {
        field: SamplingParams(max_tokens=40, temperature=1.0, grammar='start: "no"', **fields)
        for field, (fields, _) in cases.items()
    }
    outputs = run(engine, [AddRequest(field, [5], each) for field, each in params.items()])
    engine.close()
    for field, (_, text) in cases.items():
        assert Tokenizer(tokenizer_dir).decode(tokens(outputs[field])) == text
        assert outputs[field][-1].error == f"no token is left to sample: excluded by {field}, the grammar"
        assert not outputs[field][-1].is_server_fault


def test_an_output_ends_where_its_grammar_does(tokenizer_dir: Path) -> None:
    engine = engine_of(tokenizer_dir, 1, 2)
    params = SamplingParams(max_tokens=40, grammar='start: "no"', ignore_eos=True)
    (out,) = run(engine, [AddRequest("0", [5], params)]).values()
    assert Tokenizer(tokenizer_dir).decode(tokens(out)) == "no"
    assert out[-1].finish_reason == "stop"


# -- models whose output cannot be constrained -------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", [None, {"type": "Metaspace"}, {"type": "BPEDecoder"}, {"type": "WordPiece"}])
def test_a_tokenizer_of_another_kind_refuses_grammars(tokenizer_dir: Path, tmp_path: Path, decoder: Any) -> None:
    described = json.loads((tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8"))
    full: dict[str, dict[str, Any]] = {
        "Metaspace": {"replacement": "▁", "prepend_scheme": "always", "split": True},
        "BPEDecoder": {"suffix": "</w>"},
        "WordPiece": {"prefix": "##", "cleanup": True},
    }
    described["decoder"] = decoder and {**decoder, **full[decoder["type"]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(described), encoding="utf-8")
    engine = tiny_engine(tiny_model(config=SHAPE), gamma=0, directory=tmp_path)
    with pytest.raises(RequestError, match="grammar: the model's tokenizer is of a kind that cannot be matched: "):
        engine.add(AddRequest("0", [5], SamplingParams(grammar='start: "no"')))
    assert len(tokens(run(engine, [AddRequest("1", [5], SamplingParams(max_tokens=9))])["1"])) == 9


def test_a_model_without_an_end_of_sequence_refuses_grammars(tokenizer_dir: Path) -> None:
    engine = tiny_engine(tiny_model(config=replace(SHAPE, eos_token_ids=())), gamma=0, directory=tokenizer_dir)
    with pytest.raises(RequestError, match="grammar: the model has no end-of-sequence token"):
        engine.add(AddRequest("0", [5], SamplingParams(grammar='start: "no"')))
