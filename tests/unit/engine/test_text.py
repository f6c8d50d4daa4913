from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.params import SamplingParams
from engine.text import TextStream, stop_strings
from models.tokenizer import IncrementalDecoder, Tokenizer
from tests.support.tiny import write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return Tokenizer(directory)


@pytest.fixture(scope="module")
def letters(tokenizer: Tokenizer) -> dict[str, int]:
    """The token of each single byte."""
    return {tokenizer.token_bytes(token).decode("latin-1"): token for token in range(3, 320)}


@dataclass
class Result:
    text: str
    used: int
    stopped: str | None
    pieces: list[str]


def run(stream: TextStream, rounds: list[list[int]], stop_token: bool = False) -> Result:
    pieces, used = [], 0
    for index, tokens in enumerate(rounds):
        chunk = stream.push(tokens, stop_token=stop_token and index == len(rounds) - 1)
        pieces.append(chunk.text)
        used += chunk.tokens_used
        if chunk.stopped is not None:
            assert chunk.tokens_used <= len(tokens)
            return Result("".join(pieces), used, chunk.stopped, pieces)
        assert chunk.tokens_used == len(tokens)
    chunk = stream.finish()
    pieces.append(chunk.text)
    return Result("".join(pieces), used, chunk.stopped, pieces)


def reference(tokenizer: Tokenizer, params: SamplingParams, tokens: list[int]) -> Result:
    """Add one character at a time. Stop where a stop string ends first; among several, the longest."""
    decoder = IncrementalDecoder(tokenizer, params.skip_special_tokens)
    text = ""
    steps = [(count, decoder.push(token)) for count, token in enumerate(tokens, 1)]
    for count, piece in [*steps, (len(tokens), decoder.flush())]:
        for char in piece:
            text += char
            ends = [stop for stop in params.stop if text.endswith(stop)]
            if ends and count >= params.min_tokens:
                longest = max(ends, key=len)
                kept = text if params.include_stop_str_in_output else text[: -len(longest)]
                return Result(kept, count, longest, [])
    return Result(text, len(tokens), None, [])


ALPHABET = "abé"


@given(
    text=st.text(ALPHABET, max_size=30),
    stops=st.lists(st.text(ALPHABET, min_size=1, max_size=5), max_size=4),
    include=st.booleans(),
    min_tokens=st.integers(0, 20),
    data=st.data(),
)
def test_text_and_stop_do_not_depend_on_rounds(
    tokenizer: Tokenizer,
    letters: dict[str, int],
    text: str,
    stops: list[str],
    include: bool,
    min_tokens: int,
    data: st.DataObject,
) -> None:
    tokens = [letters[chr(byte)] for byte in text.encode()]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=8)))
    rounds = [tokens[a:b] for a, b in zip([0, *cuts], [*cuts, len(tokens)], strict=True)]
    params = SamplingParams(stop=tuple(stops), include_stop_str_in_output=include, min_tokens=min_tokens)
    want = reference(tokenizer, params, tokens)
    got = run(TextStream(tokenizer, params), rounds)
    assert (got.text, got.stopped) == (want.text, want.stopped)
    if want.stopped is not None:
        assert got.used == want.used


@given(tokens=st.lists(st.integers(0, 319), max_size=40), stops=st.lists(st.text(max_size=3), max_size=3))
def test_any_tokens(tokenizer: Tokenizer, tokens: list[int], stops: list[str]) -> None:
    params = SamplingParams(stop=tuple(stop for stop in stops if stop))
    want = reference(tokenizer, params, tokens)
    got = run(TextStream(tokenizer, params), [[token] for token in tokens])
    assert (got.text, got.stopped) == (want.text, want.stopped)
    if not params.stop:
        assert got.text == tokenizer.decode(tokens)


def spell(letters: dict[str, int], text: str) -> list[int]:
    return [letters[char] for char in text]


def test_offsets_say_where_a_token_begins(tokenizer: Tokenizer, letters: dict[str, int]) -> None:
    tokens = [0, *(letters[chr(byte)] for byte in "aé日b".encode())]
    stream = TextStream(tokenizer, SamplingParams(stop=("日c",)))
    first, second = stream.push(tokens[:4]), stream.push(tokens[4:])
    assert first.offsets + second.offsets == [0, 0, 1, 1, 2, 2, 2, 3]
    assert first.text + second.text == "aé日b"


def test_offsets_count_bytes_that_are_no_character(tokenizer: Tokenizer, letters: dict[str, int]) -> None:
    tokens = [letters[chr(byte)] for byte in b"a\xe6\x97b\xffc"]
    chunk = TextStream(tokenizer, SamplingParams()).push(tokens)
    assert chunk.text == tokenizer.decode(tokens) == "a\ufffdb\ufffdc"
    assert chunk.offsets == [0, 1, 1, 2, 3, 4]


def test_streams_that_share_stop_strings_do_not_share_text(tokenizer: Tokenizer, letters: dict[str, int]) -> None:
    params = SamplingParams(stop=("abc",))
    stops = stop_strings(params)
    one, other = (TextStream(tokenizer, params, stops=stops) for _ in range(2))
    assert one.push(spell(letters, "ab")).text == ""
    assert other.push(spell(letters, "c")).text == "c"
    assert one.push(spell(letters, "c")).stopped == "abc"


def test_what_may_become_a_stop_string_is_held_back(tokenizer: Tokenizer, letters: dict[str, int]) -> None:
    stream = TextStream(tokenizer, SamplingParams(stop=("END",)))
    assert stream.push(spell(letters, "abE")).text == "ab"
    assert stream.push(spell(letters, "N")).text == ""
    assert stream.push(spell(letters, "E")).text == "EN"
    chunk = stream.push(spell(letters, "NDxyz"))
    assert (chunk.text, chunk.tokens_used, chunk.stopped) == ("", 2, "END")


def test_held_text_comes_when_nothing_follows(tokenizer: Tokenizer, letters: dict[str, int]) -> None:
    stream = TextStream(tokenizer, SamplingParams(stop=("END",)))
    assert stream.push(spell(letters, "xEN")).text == "x"
    assert stream.finish().text == "EN"


def test_stop_string_across_a_multi_token_round(tokenizer: Tokenizer, letters: dict[str, int]) -> None:
    params = SamplingParams(stop=("b", "bcd"), include_stop_str_in_output=True)
    chunk = TextStream(tokenizer, params).push(spell(letters, "aabcd"))
    assert (chunk.text, chunk.tokens_used, chunk.stopped) == ("aab", 3, "b")


def test_min_tokens_lets_early_stop_strings_pass(tokenizer: Tokenizer, letters: dict[str, int]) -> None:
    params = SamplingParams(stop=("ab",), min_tokens=3)
    chunk = TextStream(tokenizer, params).push(spell(letters, "abab"))
    assert (chunk.text, chunk.tokens_used, chunk.stopped) == ("ab", 4, "ab")


@pytest.mark.parametrize(("include", "text"), [(False, "ab"), (True, "abZ")])
def test_stop_token_has_no_text_unless_asked_for(
    tokenizer: Tokenizer, letters: dict[str, int], include: bool, text: str
) -> None:
    stream = TextStream(tokenizer, SamplingParams(include_stop_str_in_output=include))
    got = run(stream, [spell(letters, "ab"), spell(letters, "Z")], stop_token=True)
    assert (got.text, got.used) == (text, 3)


def test_special_tokens(tokenizer: Tokenizer, letters: dict[str, int]) -> None:
    tokens = [letters["a"], 0, letters["b"]]
    assert run(TextStream(tokenizer, SamplingParams()), [tokens]).text == "ab"
    shown = run(TextStream(tokenizer, SamplingParams(skip_special_tokens=False)), [tokens])
    assert shown.text == "a<|endoftext|>b"
    stopped = TextStream(tokenizer, SamplingParams(skip_special_tokens=False, stop=("<|endo",))).push(tokens)
    assert (stopped.text, stopped.tokens_used) == ("a", 2)
