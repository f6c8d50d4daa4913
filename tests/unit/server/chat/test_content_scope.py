"""Stop strings match the content of an answer, wherever rounds end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.params import SamplingParams
from engine.text import TextStream
from models.tokenizer import Tokenizer
from server.chat.answer_parser import AnswerParser
from server.chat.content_scope import ContentScope
from server.text.thinking.harmony_thinking import HarmonyThinking
from server.text.thinking.tagged_thinking import TaggedThinking
from server.text.thinking.thinking_format import Mark, Stage, ThinkingFormat
from tests.support.harmony_model import write_harmony_tokenizer

ANALYSIS, FINAL = (f"<|channel|>{name}<|message|>" for name in ("analysis", "final"))
GAP = "\n\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_harmony_tokenizer(tmp_path_factory.mktemp("harmony")))


def answer(
    tokenizer: Tokenizer, form: ThinkingFormat, tokens: list[int], cuts: list[int], params: SamplingParams
) -> tuple[str, str | None]:
    """Return the content of an answer that comes in rounds, and the stop string that ended it."""
    ids = {tokenizer.id_of(name): name for name in form.marks}
    names = {id: name for id, name in ids.items() if id is not None}
    scope = ContentScope(form.splitter(Stage.UNDECIDED), names, has_calls=False)
    stream = TextStream(tokenizer, params, shown=frozenset(names), scope=scope)
    parser = AnswerParser(form.splitter(Stage.UNDECIDED), None, str)
    content = ""
    for begin, end in zip([0, *cuts], [*cuts, len(tokens)], strict=True):
        chunk = stream.push(tokens[begin:end])
        marks = [
            Mark(offset, names[token])
            for token, offset in zip(tokens[begin:end], chunk.offsets, strict=False)
            if token in names
        ]
        content += parser.feed(chunk.text, chunk.offsets, marks, ends=chunk.stopped is not None).content
        if chunk.stopped is not None:
            return content, chunk.stopped
    chunk = stream.finish()
    return content + parser.feed(chunk.text, [], ends=True).content, chunk.stopped


def expected(content: str, stops: list[str]) -> tuple[str, str | None]:
    for end in range(1, len(content) + 1):
        found = [stop for stop in stops if content.endswith(stop, 0, end)]
        if found:
            longest = max(found, key=len)
            return content[: end - len(longest)], longest
    return content, None


TEXTS = st.text("abéfinal", max_size=6)
STOPS = st.lists(st.text("abéfinal\n", min_size=1, max_size=4), min_size=1, max_size=3)


@given(st.lists(st.tuples(st.sampled_from([ANALYSIS, FINAL]), TEXTS), max_size=4), STOPS, st.data())
def test_stop_strings_match_the_messages_of_the_final_channel(
    tokenizer: Tokenizer, messages: list[tuple[str, str]], stops: list[str], data: st.DataObject
) -> None:
    text = "<|end|><|start|>assistant".join(header + text for header, text in messages)
    tokens = tokenizer.encode(text, add_special_tokens=False)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=8)))
    form = HarmonyThinking()
    free, _ = answer(tokenizer, form, tokens, cuts, SamplingParams())
    if free:  # one that matches, maybe from one message into the next
        begin = data.draw(st.integers(0, len(free) - 1))
        stops = [*stops[1:], free[begin : begin + data.draw(st.integers(1, 5))]]
    want, stopped = expected(free, stops)
    got = answer(tokenizer, form, tokens, cuts, SamplingParams(stop=tuple(stops)))
    # A line break between messages comes with the second one only: a match that begins in it drops all of it.
    assert got == (want.rstrip(GAP) if stopped else want, stopped)


@given(st.lists(st.sampled_from(["<think>", "</think>", "a", "b", "é", "</", "think", " ", "\n"]), max_size=9), STOPS)
def test_stop_strings_match_what_follows_tags(tokenizer: Tokenizer, pieces: list[str], stops: list[str]) -> None:
    form = TaggedThinking("think", "<think>", "</think>")
    for text in ("".join(pieces), "<think>" + "".join(pieces)):
        tokens = tokenizer.encode(text, add_special_tokens=False)
        free, _ = answer(tokenizer, form, tokens, [], SamplingParams())
        for cuts in ([], list(range(1, len(tokens)))):
            assert answer(tokenizer, form, tokens, cuts, SamplingParams(stop=tuple(stops))) == expected(free, stops)


def test_min_tokens_is_of_the_token_that_completes_a_match(tokenizer: Tokenizer) -> None:
    """Whether line breaks before the first letter are content is known with that letter only."""
    form = TaggedThinking("think", "<think>", "</think>")
    tokens = [token for piece in ("\n", "\n", "a", "b", "\n", "c") for token in tokenizer.encode(piece, False)]
    assert len(tokens) == 6
    for min_tokens, want in ((2, "\n"), (3, "\n\nab"), (5, "\n\nab"), (6, "\n\nab\nc")):
        params = SamplingParams(stop=("\n",), min_tokens=min_tokens)
        for cuts in ([], [1, 2, 3, 4, 5]):
            assert answer(tokenizer, form, tokens, cuts, params)[0] == want
