"""Thinking is split from content, wherever the text is cut."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.tokenizer import Tokenizer
from server.text.structured import ResponseFormat
from server.text.thinking.tagged_thinking import TaggedThinking
from server.text.thinking.thinking_format import Kind, Stage, ThinkingSplitter, behind_thinking
from server.text.thinking.thinking_registry import THINKING_FORMATS, choose_thinking
from tests.support.tool_walks import Walker, write_tool_tokenizer

THINK = TaggedThinking("think", "<think>", "</think>")
ANSWERS = [
    ("<think>\nSeven times six.\n</think>\n\nIt is 42.", Stage.UNDECIDED, "Seven times six.", "It is 42."),
    ("\n<think>a</think>b", Stage.UNDECIDED, "a", "b"),
    ("Seven\n\ntimes six.</think>\n\nIt is 42.\n", Stage.THINKING, "Seven\n\ntimes six.", "It is 42.\n"),
    ("\n\n</think>\n\nHello", Stage.THINKING, "", "Hello"),
    ("It is 42.", Stage.UNDECIDED, "", "It is 42."),
    ("<thing> is <think>", Stage.UNDECIDED, "", "<thing> is <think>"),
    ("<thi", Stage.UNDECIDED, "", "<thi"),
    ("  ", Stage.UNDECIDED, "", "  "),
    ("a </thin b </think", Stage.THINKING, "a </thin b </think", ""),
    ("<think>never ends ", Stage.UNDECIDED, "never ends", ""),
    ("a</think> b</think> c", Stage.THINKING, "a", "b</think> c"),
    ("<think>a</think>", Stage.UNDECIDED, "a", ""),
    ("x </think> y", Stage.CONTENT, "", "x </think> y"),
]


def split(pieces: list[str], stage: Stage) -> tuple[str, str, ThinkingSplitter]:
    splitter = THINK.splitter(stage)
    parts = [part for piece in pieces for part in splitter.feed(piece)] + splitter.finish()
    kinds = (Kind.THINKING, Kind.CONTENT)
    thinking, content = ("".join(part.text for part in parts if part.kind is kind) for kind in kinds)
    return thinking, content, splitter


@pytest.mark.parametrize(("text", "stage", "thinking", "content"), ANSWERS)
def test_answers_split_the_same_at_every_place(text: str, stage: Stage, thinking: str, content: str) -> None:
    for size in range(1, len(text) + 1):
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        assert split(pieces, stage)[:2] == (thinking, content), pieces


def without(text: str, begin: str, end: str) -> list[str]:
    """List what may be left of a text without marks."""
    return [part.replace(end, "", 1) for part in (text, text.removeprefix(begin))]


@given(st.text(alphabet="<>/think \n", max_size=40), st.sampled_from(Stage), st.data())
def test_cuts_change_nothing(text: str, stage: Stage, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole, cut = split([text], stage), split(pieces, stage)
    assert cut[:2] == whole[:2]
    for name in ("thinking", "content_start", "decided"):
        assert getattr(cut[2], name) == getattr(whole[2], name)
    # Nothing is lost but the marks, and spaces beside them.
    left, marks = "".join(cut[0].split() + cut[1].split()), "".join(text.split())
    assert left in (marks, marks.removeprefix(THINK.begin), *(without(marks, THINK.begin, THINK.end)))


def test_the_end_of_the_thinking_is_known_in_characters() -> None:
    text = "<think>\nabc\n</think>\n\nd"
    end = text.index("</think>") + len("</think>")
    whole, open_ended, none = (
        split([text], Stage.UNDECIDED)[2],
        split(["abc"], Stage.THINKING)[2],
        split(["abc"], Stage.UNDECIDED)[2],
    )
    assert (whole.thinking, whole.content_start) == ([(0, end)], end)
    assert (open_ended.thinking, open_ended.content_start) == ([(0, None)], None)
    assert (none.thinking, none.content_start) == ([], 0)


@pytest.mark.parametrize(
    ("prompt", "prefill", "stage"),
    [
        ("<|im_start|>assistant\n", None, Stage.UNDECIDED),
        ("<|im_start|>assistant\n<think>\n", None, Stage.THINKING),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", None, Stage.CONTENT),
        ("…Sure, ", "Sure, ", Stage.CONTENT),
        ("…<think>I", "<think>I", Stage.THINKING),
        ("…", "", Stage.UNDECIDED),
    ],
)
def test_the_prompt_says_where_an_answer_begins(prompt: str, prefill: str | None, stage: Stage) -> None:
    assert THINK.stage_of(prompt, prefill) is stage
    assert choose_thinking("none", None).stage_of(prompt, prefill) is Stage.CONTENT


def test_formats_are_chosen_by_setting_or_template() -> None:
    assert choose_thinking("auto", "… '</think>' …").name == "think"
    assert choose_thinking("auto", "… '<|channel|>final<|message|>' …").name == "harmony"
    assert choose_thinking("auto", "…").name == "none"
    assert choose_thinking("auto", None).name == "none"
    for name, format in THINKING_FORMATS.items():
        assert format.name == name
        assert choose_thinking(name, "</think>") is format


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("names", [(THINK.begin, THINK.end), ()])
def test_thinking_ends_where_the_grammar_says(tmp_path: Path, names: tuple[str, ...], special: bool) -> None:
    file = write_tool_tokenizer(tmp_path, names, special=special)
    tokens, walker = Tokenizer(tmp_path).names_in_grammars, Walker(file)
    json_object = ResponseFormat(type="json_object").grammar()
    assert json_object is not None
    for stage, begin in ((Stage.THINKING, ()), (Stage.UNDECIDED, (THINK.begin,))):
        grammar = behind_thinking(json_object, THINK, stage, tokens).text
        assert walker.matches(grammar, *begin, "a <", "/think", THINK.end, '\n\n{"a": 1}')
        spelled = [*begin, "a ", *THINK.end]
        assert walker.matches(grammar, *spelled, '{"a": 1}') == (not names)
        assert not walker.matches(grammar, *spelled, " b ", THINK.end, '{"a": 1}')
