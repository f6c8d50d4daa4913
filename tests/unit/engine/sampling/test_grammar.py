"""Grammar-constrained output: allowed tokens at each position, unchanged by drafts and ranks."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from llguidance import LLMatcher
from numpy.typing import NDArray

from engine.batch.row_state import RowState
from engine.messages import AddRequest
from engine.params import SamplingParams
from engine.plan import RowStart
from engine.sampling.grammar import Grammars
from engine.sampling.grammar_limits import MAX_ITEMS
from engine.scheduler.validation import RequestError
from models.tokenizer import Tokenizer
from parallel import shm
from tests.support.engines import TINY, complete, run, tiny_engine, tiny_model, tokens
from tests.support.profiles import is_all, only_in_all
from tests.support.ranks import threaded_engine
from tests.support.schemas import random_schema
from tests.support.tiny import TOKENS, write_tokenizer

SHAPE = replace(TINY, vocab_size=TOKENS, eos_token_ids=(2,))
SEEDS = range(40 if is_all() else 14)


def of_schema(schema: dict[str, Any]) -> str:
    return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})


def schemas() -> list[dict[str, Any]]:
    return [random_schema(random.Random(seed)) for seed in SEEDS]


def requests(**others: Any) -> list[AddRequest]:
    """One request per schema, and some without a grammar in between."""
    found = []
    for seed, schema in zip(SEEDS, schemas(), strict=True):
        params = SamplingParams(
            max_tokens=250,
            temperature=(0.0, 1.0, 1.5)[seed % 3],
            top_k=(0, 20)[seed % 2],
            seed=seed,
            grammar=of_schema(schema),
            **others,
        )
        found.append(AddRequest(str(seed), [3 + (seed * 7 + i) % 300 for i in range(1 + seed % 30)], params))
        if seed % 4 == 0:
            free = SamplingParams(max_tokens=30, temperature=1.0, seed=seed)
            found.append(AddRequest(f"free {seed}", [5, 6, 7], free))
    return found


@pytest.fixture(scope="module")
def plain(tokenizer_dir: Path) -> dict[str, list[int]]:
    """Output of each request without drafts."""
    outputs = run(tiny_engine(tiny_model(config=SHAPE), gamma=0, directory=tokenizer_dir), requests())
    return {id: tokens(out) for id, out in outputs.items()}


def check(tokenizer_dir: Path, outputs: dict[str, list[int]]) -> None:
    tokenizer = Tokenizer(tokenizer_dir)
    for seed, schema in zip(SEEDS, schemas(), strict=True):
        mine = outputs[str(seed)]
        assert mine[-1] == 2
        jsonschema.validate(json.loads(tokenizer.decode(mine)), schema)


@pytest.mark.parametrize("policy", ["verified", *(only_in_all(each) for each in ("window", "quest", "snapkv"))])
def test_every_output_matches_with_and_without_drafts(
    tokenizer_dir: Path, plain: dict[str, list[int]], policy: str
) -> None:
    check(tokenizer_dir, plain)
    kv = {"policy": policy, "budget": 16} | ({"recent": 8} if policy == "snapkv" else {"sink": 4})
    engine = tiny_engine(tiny_model(config=SHAPE), gamma=3, directory=tokenizer_dir, speculation={"kv": kv})
    drafted = run(engine, requests())
    assert {id: tokens(out) for id, out in drafted.items()} == plain
    assert engine.stats().accepted_tokens > engine.stats().rounds / 2  # much of JSON leaves only one choice
    assert engine.stats().rejections > 0


def test_preempted_requests_go_on_where_they_were(tokenizer_dir: Path, plain: dict[str, list[int]]) -> None:
    model = tiny_model(config=SHAPE)
    engine = tiny_engine(model, gamma=2, directory=tokenizer_dir, cache={"num_pages": 75}, max_model_len=290)
    long = SamplingParams(max_tokens=60, ignore_eos=True)
    crowd = [AddRequest(f"crowd {i}", [5 + i] * 40, long) for i in range(3)]
    found = run(engine, [*crowd, *requests()])
    assert engine.stats().preemptions > 0
    assert {id: tokens(found[id]) for id in plain} == plain


def test_rejection_keeps_to_grammars_too(tokenizer_dir: Path) -> None:
    speculation = {"verification": "rejection", "gamma": 3}
    engine = tiny_engine(tiny_model(config=SHAPE), gamma=3, directory=tokenizer_dir, speculation=speculation)
    check(tokenizer_dir, {id: tokens(out) for id, out in run(engine, requests()).items()})


@pytest.mark.skipif(not shm.available(), reason="needs shared memory between ranks")
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_agree(tokenizer_dir: Path, plain: dict[str, list[int]], size: int) -> None:
    engine, _ = threaded_engine(
        SHAPE, size, gamma=3, share=True, digest_every=1, model=str(tokenizer_dir), max_model_len=400
    )
    found = run(engine, requests())
    engine.close()
    assert {id: tokens(out) for id, out in found.items()} == plain


def test_a_model_without_a_tokenizer_has_no_grammars() -> None:
    engine = tiny_engine(tiny_model(config=SHAPE), gamma=0)
    with pytest.raises(RequestError, match=r"grammar: the model's tokenizer\.json was not found"):
        engine.add(AddRequest("0", [5], SamplingParams(grammar='start: "no"')))


# -- masks -------------------------------------------------------------------------------------------------------------


def allowed(words: NDArray[np.int32]) -> list[set[int]]:
    bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")
    return [set(np.flatnonzero(row).tolist()) for row in bits]


def grammars(tokenizer_dir: Path, grammar: str, output: list[int] | None = None) -> Grammars:
    state = RowState(max_rows=4, max_model_len=16, page_size=4, device=torch.device("cpu"))
    made = Grammars(state, tokenizer_dir / "tokenizer.json", TOKENS, [2])
    made.start(RowStart(1, [7, 8, *(output or [])], 2, SamplingParams(grammar=grammar), []))
    return made


def test_a_token_that_only_tokenizer_config_lists(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    config = {"added_tokens_decoder": {str(TOKENS): {"content": "<x>", "special": True}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    state = RowState(max_rows=4, max_model_len=16, page_size=4, device=torch.device("cpu"))
    made = Grammars(state, tmp_path / "tokenizer.json", TOKENS + 1, [2])
    made.start(RowStart(1, [7, 8], 2, SamplingParams(grammar='start: "a" <x>? "b"'), []))
    a, b = (Tokenizer(tmp_path).encode(text)[0] for text in "ab")
    assert allowed(made.masks(1, [a, TOKENS, b])) == [{a}, {b, TOKENS}, {b}, {2}]


def test_masks_behind_drafts(tokenizer_dir: Path) -> None:
    a, b, c = (Tokenizer(tokenizer_dir).encode(text)[0] for text in "abc")
    made = grammars(tokenizer_dir, 'start: "a" ("b" | "c") "a"')
    assert allowed(made.masks(1, [])) == [{a}]
    assert allowed(made.masks(1, [a, b, a])) == [{a}, {b, c}, {a}, {2}]
    assert allowed(made.masks(1, [a, b, a, 2, 2])) == [{a}, {b, c}, {a}, {2}, {2}, {2}]
    assert allowed(made.masks(1, [a, b, a], first=2)) == [{a}, {2}]
    # After a mismatch the mask stays the same.
    assert allowed(made.masks(1, [a, a, b])) == [{a}, {b, c}, {b, c}, {b, c}]
    assert allowed(made.masks(1, [])) == [{a}]  # state restored
    made.commit(1, [a, c])
    made.commit(0, [a])  # row 0 has no grammar
    assert allowed(made.masks(1, [a])) == [{a}, {2}]
    made.commit(1, [a, 2])
    assert allowed(made.masks(1, [])) == [{2}]
    assert allowed(grammars(tokenizer_dir, 'start: "a" ("b" | "c") "a"', [a, c]).masks(1, [])) == [{a}]
    made.start(RowStart(1, [7], 1, SamplingParams(), []))
    assert not made.constrained.any()


class Fragile:
    """A matcher that fails after a certain token, as for lack of resources."""

    def __init__(self, matcher: LLMatcher, token: int) -> None:
        self._matcher, self._token, self._broken = matcher, token, False

    def try_consume_tokens(self, tokens: list[int]) -> int:
        self._broken |= self._token in tokens
        return 0 if self._broken else self._matcher.try_consume_tokens(tokens)

    def is_error(self) -> bool:
        return self._broken

    def get_error(self) -> str:
        return "too complex"

    def deep_copy(self) -> LLMatcher:
        return self._matcher.deep_copy()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._matcher, name)


def test_a_grammar_that_fails_after_a_draft_fails_only_if_the_draft_is_right(
    tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = (Tokenizer(tokenizer_dir).encode(text)[0] for text in "ab")
    compiled = Grammars._compile
    monkeypatch.setattr(Grammars, "_compile", lambda self, grammar: Fragile(compiled(self, grammar), b))
    made = grammars(tokenizer_dir, 'start: ("a" | "b")+')
    assert allowed(made.masks(1, [a, b, a])) == [{a, b}, {a, b, 2}, set(), set()]
    assert made.error(1) == "too complex"
    made.commit(1, [a])
    assert allowed(made.masks(1, [a])) == [{a, b, 2}, {a, b, 2}]  # the matcher was made anew
    assert made._failures.cause(1) is None
    made.commit(1, [b])
    assert made._failures.cause(1) == ("the grammar failed: too complex", True)


@pytest.mark.parametrize("grammar", ["start: gen\ngen[max_tokens=3]: /.*/", 'start: gen "b"\ngen[stop="b"]: /[ab]*/'])
def test_matchers_that_cannot_take_tokens_back(tokenizer_dir: Path, grammar: str) -> None:
    """Drafts change no text: they are matched on a copy."""
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=1, grammar=grammar)
    requests = [AddRequest(str(i), [5, 6, 7 + i], params) for i in range(4)]
    plain, drafted = (
        run(tiny_engine(tiny_model(config=SHAPE), gamma=gamma, directory=tokenizer_dir), requests) for gamma in (0, 3)
    )
    assert {id: tokens(out) for id, out in drafted.items()} == {id: tokens(out) for id, out in plain.items()}
    assert all(out[-1].finish_reason == "stop" for out in drafted.values())


@pytest.mark.parametrize("gamma", [0, 3])
def test_long_forced_texts_fail_their_row(tokenizer_dir: Path, gamma: int) -> None:
    """Each mask would walk through all of it, while other rows wait."""
    engine = tiny_engine(tiny_model(config=SHAPE), gamma=gamma, directory=tokenizer_dir)
    letters = 'start: /[bc]{3}/ "' + 20_000 * "a" + '"'
    (out,) = run(engine, [AddRequest("0", [5], SamplingParams(max_tokens=40, grammar=letters))]).values()
    assert len(Tokenizer(tokenizer_dir).decode(tokens(out))) == 3
    assert out[-1].error == "the grammar failed: it forces a text of more than 16384 bytes"
    assert not out[-1].is_server_fault


@pytest.mark.parametrize("gamma", [0, 3])
@pytest.mark.parametrize("grammar", ['start: "b" "<|im" "_start|>" "b"', r"start: /b[<<]\|im_start\|>/"])
def test_a_forced_name_of_a_special_token_fails_its_row(tokenizer_dir: Path, grammar: str, gamma: int) -> None:
    """The compiler would force the token, which is no text."""
    engine = tiny_engine(tiny_model(config=SHAPE), gamma=gamma, directory=tokenizer_dir)
    (out,) = run(engine, [AddRequest("0", [5], SamplingParams(max_tokens=40, grammar=grammar))]).values()
    assert Tokenizer(tokenizer_dir).decode(tokens(out)) == "b"
    assert out[-1].error == "the grammar failed: it forces the name of a special token, <|im_start|>"
    assert not out[-1].is_server_fault


def test_special_tokens_that_a_grammar_demands_as_such(tokenizer_dir: Path) -> None:
    made = grammars(tokenizer_dir, 'start: <|im_start|> "b" <[0]>')
    b = Tokenizer(tokenizer_dir).encode("b")[0]
    assert allowed(made.masks(1, [1, b])) == [{1}, {b}, {0}]
    assert made._failures.cause(1) is None


def test_right_recursion_fails_its_row_early(tokenizer_dir: Path) -> None:
    """Each byte costs the more the longer the output is, and a replay all of that at once."""
    a = Tokenizer(tokenizer_dir).encode("a")[0]
    made = grammars(tokenizer_dir, 'start: x\nx: "a" x | "a"', [a] * (MAX_ITEMS - 50))
    assert made._failures.cause(1) is None
    made.commit(1, [a] * 100)
    cause = made._failures.cause(1)
    assert cause is not None
    assert cause[0].startswith(f"the grammar failed: Parser Error: Current row has {MAX_ITEMS + 1} items; ")
    assert cause[1]


def test_a_grammar_that_does_not_compile_fails_its_row(tokenizer_dir: Path) -> None:
    made = grammars(tokenizer_dir, "start: nothing")
    cause = made._failures.cause(1)
    assert cause is not None
    assert cause[0].startswith("the grammar failed: ")
    assert "nothing" in cause[0]
    assert cause[1]


# -- tokens and words --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0, 3])
def test_only_allowed_tokens(gamma: int) -> None:
    engine = tiny_engine(tiny_model(config=SHAPE), gamma=gamma)
    params = SamplingParams(max_tokens=60, temperature=2.0, ignore_eos=True, allowed_token_ids=(3, 50, 319))
    assert set(complete(engine, [5, 6], params)) == {3, 50, 319}


@pytest.mark.parametrize("size", [1, 2])
def test_words_that_are_not_allowed(size: int) -> None:
    """Three tokens can be drawn: one may not follow another, and two may not come three times in a row."""
    if size > 1 and not shm.available():
        pytest.skip("needs shared memory between ranks")
    words = ((3, 50), (50, 50, 50), (319,), (3, 3, 3))
    found, new = [], 100 if is_all() else 60
    for gamma in (0, 3):
        engine, _ = threaded_engine(SHAPE, size, gamma=gamma, share=size > 1)
        params = SamplingParams(
            max_tokens=new,
            temperature=5.0,
            ignore_eos=True,
            allowed_token_ids=(3, 50, 60, 319),
            bad_words=words,
        )
        out = complete(engine, [3], params)
        engine.close()
        assert set(out) == {3, 50, 60}
        text = [3, *out]
        for word in words:
            assert all(tuple(text[i : i + len(word)]) != word for i in range(len(text)))
        assert (50, 3) in set(pairwise(out))
        found.append(out)
    assert found[0] == found[1]


def test_a_tokenizer_with_more_tokens_than_the_model(tokenizer_dir: Path) -> None:
    shape = replace(SHAPE, vocab_size=TOKENS - 40)
    engine = tiny_engine(tiny_model(config=shape), gamma=2, directory=tokenizer_dir)
    params = SamplingParams(max_tokens=20, temperature=1.0, grammar="start: /[a-c]{3}/")
    found = complete(engine, [5], params)
    assert len(found) > 1
    assert found[-1] == 2
    assert re.fullmatch("[a-c]{3}", Tokenizer(tokenizer_dir).decode(found))


def test_a_model_without_end_takes_no_grammar(tokenizer_dir: Path) -> None:
    engine = tiny_engine(tiny_model(config=replace(SHAPE, eos_token_ids=())), gamma=2, directory=tokenizer_dir)
    with pytest.raises(RequestError, match="grammar: the model has no end-of-sequence token"):
        complete(engine, [5], SamplingParams(max_tokens=4, grammar='start: "no"'))
    assert len(complete(engine, [5], SamplingParams(max_tokens=4))) == 4
