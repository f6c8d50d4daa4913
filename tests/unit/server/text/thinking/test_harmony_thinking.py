"""Messages in channels are split into thinking and content, wherever the text is cut; only special tokens are marks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.tokenizer import Tokenizer
from server.text.structured import Grammar
from server.text.thinking.harmony_thinking import HarmonyThinking
from server.text.thinking.thinking_format import Kind, Mark, Stage, ThinkingSplitter, behind_thinking
from tests.support.tool_walks import Walker, write_tool_tokenizer

HARMONY = HarmonyThinking()
ANALYSIS, COMMENTARY, FINAL = (f"<|channel|>{name}<|message|>" for name in ("analysis", "commentary", "final"))
NEXT = "<|end|><|start|>assistant"
CALL = "<|channel|>commentary to=functions.now <|constrain|>json<|message|>{}"
OTHER = " to=functions.now<|channel|>commentary json<|message|>{}"
PYTHON = "<|channel|>analysis to=python code<|message|>1"
TYPED, PLAINLY = (f" to=functions.f {type}<|message|>{{}}" for type in ("<|constrain|>json", "json"))
THINKS = "<|channel|>analysis to=functions.now<|message|>{}"
SPELLED = "\\"
"""Before a mark: it is spelled in ordinary tokens."""

# Text, then thinking, content in which no call can be, and content that may have one.
ANSWERS = {
    "thinking and content": (f"{ANALYSIS}Six times seven.{NEXT}{FINAL}42", "Six times seven.", "42", ""),
    "content": (f"{FINAL}4 <|2|> <b>", "", "4 <|2|> <b>", ""),
    "content that ends": (f"{ANALYSIS}a{NEXT}{FINAL}b<|end|>", "a", "b", ""),
    "content that returns": (f"{FINAL}b<|return|>", "", "b", ""),
    "content of a type": ('<|channel|>final <|constrain|>json<|message|>{"a": 1}', "", '{"a": 1}', ""),
    "content for somebody": ("<|channel|>final to=user<|message|>hi", "", "hi", ""),
    "several messages": (f"{ANALYSIS}a{NEXT}{COMMENTARY}b{NEXT}{ANALYSIS}c{NEXT}{FINAL}d", "a\n\nb\n\nc", "d", ""),
    "content twice": (f"{FINAL}a{NEXT}{FINAL}b", "", "a\n\nb", ""),
    "thinking after content": (f"{FINAL}a{NEXT}{ANALYSIS}b{NEXT}{FINAL}c", "b", "ac", ""),
    "content for all": ("<|channel|>final to=all<|message|>hi", "", "hi", ""),
    "a call of a type without a channel": (f"{ANALYSIS}a{NEXT}{TYPED}", "a", "", TYPED),
    "a call of a plain type without a channel": (f"{ANALYSIS}a{NEXT}{PLAINLY}", "a", "", PLAINLY),
    "a call after content": (f"{ANALYSIS}a{NEXT}{FINAL}b{NEXT}{CALL}", "a", "b", CALL),
    "several calls": (f"{CALL}<|call|><|start|>assistant{CALL}<|end|>", "", "", CALL + CALL),
    "empty thinking": (f"{ANALYSIS}{NEXT}{ANALYSIS} \n{NEXT}{FINAL}d", "", "d", ""),
    "spaces beside marks": (f"\n{ANALYSIS} a \n{NEXT}{FINAL}\nb ", "a", "b ", ""),
    "spaces in headers": (f"{ANALYSIS}a<|end|><|start|>assistant\n<|channel|>final\n<|message|>b", "a", "b", ""),
    "no end of the thinking": (f"{ANALYSIS}a{FINAL}b", "a", "b", ""),
    "no end, but a start": (f"{ANALYSIS}a<|start|>assistant{FINAL}b", "a", "b", ""),
    "two starts": (f"{ANALYSIS}a{NEXT}<|start|>assistant{FINAL}b", "a", "b", ""),
    "no role": (f"{ANALYSIS}a<|end|><|start|>{FINAL}b", "a", "b", ""),
    "a call": (f"{ANALYSIS}a{NEXT}{CALL}", "a", "", CALL),
    "a call that ends": (f"{CALL}<|call|>", "", "", CALL),
    "a call in another order": (f"{ANALYSIS}a{NEXT}{OTHER}", "a", "", OTHER),
    "a call in another order, without thinking": (OTHER, "", "", OTHER),
    "a message for a program": (PYTHON, "", PYTHON, ""),
    "a call in the channel of thinking": (THINKS, "", "", THINKS),
    "another's message": (f"{ANALYSIS}a<|end|><|start|>user<|message|>b", "a", "<|start|>user<|message|>b", ""),
    "another channel": ("<|channel|>verse<|message|>a", "", "a", ""),
    "no channel": ("<|message|>a", "", "a", ""),
    "plain text": ("It is 42.", "", "It is 42.", ""),
    "plain text like a recipient": ("to=5", "", "to=5", ""),
    "plain text like a call": ("to=functions.now {}", "", "to=functions.now {}", ""),
    "marks that are spelled": (f"{ANALYSIS}a\\<|channel|>{NEXT}{FINAL}\\<|end|>b", "a<|channel|>", "<|end|>b", ""),
    "plain text that spells a mark": (f"{SPELLED}<|channel|> is a mark", "", "<|channel|> is a mark", ""),
    "a mark in a message": (f"{FINAL}a<|message|>b", "", "a<|message|>b", ""),
    "a long header": (f"<|channel|>{'x' * 300}", "", f"<|channel|>{'x' * 300}", ""),
    "cut in a header": ("<|channel|>ana", "", "", ""),
    "cut in a second header": (f"{ANALYSIS}a{NEXT}<|channel|>fi", "a", "", ""),
    "cut in thinking": (f"{ANALYSIS}a b ", "a b", "", ""),
    "nothing": ("", "", "", ""),
}  # fmt: skip


def marks_in(text: str) -> tuple[str, list[Mark]]:
    """Return a text without backslashes, and its marks but for those behind one."""
    plain, marks = "", []
    for part in re.split(r"(\\?<\|\w+\|>)", text):
        if part in HARMONY.marks:
            marks.append(Mark(len(plain), part))
        plain += part.removeprefix(SPELLED)
    return plain, marks


def split(text: str, cuts: Sequence[int], stage: Stage) -> tuple[list[str], ThinkingSplitter]:
    """Split a text that arrives in pieces, each mark with the piece in which it begins. Returns the texts of each
    kind."""
    plain, marks = marks_in(text)
    splitter, parts = HARMONY.splitter(stage), []
    for begin, end in zip([0, *cuts], [*cuts, len(plain)], strict=True):
        parts += splitter.feed(plain[begin:end], [mark for mark in marks if begin <= mark.offset < end])
    parts += splitter.finish()
    kinds = (Kind.THINKING, Kind.PLAIN, Kind.CALL)
    return ["".join(part.text for part in parts if part.kind is kind) for kind in kinds], splitter


@pytest.mark.parametrize("answer", ANSWERS)
def test_answers_split_the_same_at_every_place(answer: str) -> None:
    text, *expected = ANSWERS[answer]
    length = len(marks_in(text)[0])
    for size in range(1, length + 2):
        assert split(text, range(size, length, size), Stage.UNDECIDED)[0] == expected, size


PIECES = [
    *("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>", "<|constrain|>"),
    *("assistant", "analysis", "final", "commentary", " to=functions.now", "\n", " ", "<", "|", "a", "42 is it"),
    *(ANALYSIS, FINAL, NEXT, CALL, SPELLED + "<|end|>"),
]


@given(st.lists(st.sampled_from(PIECES), max_size=12), st.sampled_from(Stage), st.data())
def test_cuts_change_nothing(pieces: list[str], stage: Stage, data: st.DataObject) -> None:
    text = "".join(pieces)
    length = len(marks_in(text)[0])
    cuts = sorted(data.draw(st.lists(st.integers(0, length), max_size=6)))
    whole, of_whole = split(text, [], stage)
    for places in (cuts, range(1, length)):
        cut, of_cut = split(text, places, stage)
        assert cut == whole
        for name in ("thinking", "content_start", "decided"):
            assert getattr(of_cut, name) == getattr(of_whole, name)


@given(st.lists(st.sampled_from([ANALYSIS, FINAL, COMMENTARY]), min_size=1, max_size=5), st.data())
def test_all_text_of_messages_is_kept(headers: list[str], data: st.DataObject) -> None:
    texts = [data.draw(st.text(st.sampled_from("ab <|>\n"), max_size=9)) for _ in headers]
    parts = split(NEXT.join(header + text for header, text in zip(headers, texts, strict=True)), [], Stage.UNDECIDED)[0]
    of_final = [text for header, text in zip(headers, texts, strict=True) if header == FINAL]
    others = [text for header, text in zip(headers, texts, strict=True) if header != FINAL]
    assert "".join(parts[0].split()) == "".join("".join(others).split())
    assert "".join(parts[1].split()) == "".join("".join(of_final).split())
    assert parts[2] == ""


def test_the_places_of_thinking_and_content_are_known_in_characters() -> None:
    thought = f"{ANALYSIS}abc<|end|>"
    text = f"{thought}<|start|>assistant{FINAL}d"
    splitter = split(text, [], Stage.UNDECIDED)[1]
    assert (splitter.thinking, splitter.content_start, splitter.decided) == (
        [(0, len(thought))],
        len(text) - 1,
        len(text),
    )
    splitter = split(f"{thought}<|start|>assistant<|channel|>fi", [], Stage.UNDECIDED)[1]
    assert (splitter.thinking, splitter.content_start, splitter.decided) == ([(0, len(thought))], None, len(thought))
    later = split(f"{FINAL}d{NEXT}{ANALYSIS}e", [], Stage.UNDECIDED)[1]
    assert later.thinking == [(len(f"{FINAL}d<|end|>"), None)]


@pytest.mark.parametrize(
    ("prompt", "prefill", "stage"),
    [
        ("<|start|>user<|message|>Hi<|end|><|start|>assistant", None, Stage.UNDECIDED),
        (f"<|start|>assistant{ANALYSIS}", None, Stage.THINKING),
        (f"<|start|>assistant{FINAL}", None, Stage.CONTENT),
        (f"<|start|>assistant{FINAL}Sure, ", "Sure, ", Stage.CONTENT),
        (f"<|start|>assistant{FINAL}", "", Stage.CONTENT),
    ],
)
def test_the_prompt_says_where_an_answer_begins(prompt: str, prefill: str | None, stage: Stage) -> None:
    assert HARMONY.stage_of(prompt, prefill) is stage


def test_a_continued_answer_keeps_its_spaces() -> None:
    assert split(" b<|end|>", [], Stage.CONTENT)[0] == ["", " b", ""]
    assert split(f"a{NEXT}{FINAL}b", [], Stage.THINKING)[0] == ["a", "b", ""]


def test_spaces_take_time_in_proportion() -> None:
    """Each of many pieces is read once."""
    for header in (ANALYSIS, FINAL, ""):
        text, marks = marks_in(header)
        splitter = HARMONY.splitter(Stage.UNDECIDED)
        splitter.feed(text, marks)
        for _ in range(50_000):
            splitter.feed(" " * 8)
        assert sum(len(part.text) for part in splitter.finish()) < 500_000


@pytest.mark.parametrize("kind", ["text", "tokens", "special"])
def test_what_follows_the_thinking_matches(tmp_path: Path, kind: str) -> None:
    names = [] if kind == "text" else sorted(HARMONY.marks)
    walker = Walker(write_tool_tokenizer(tmp_path, names, special=kind == "special"))
    tokens = {name: id for name, id in Tokenizer(tmp_path).names_in_grammars.items() if name in names}
    header = ("<|channel|>", "final", "<|message|>")
    final = " ".join(f"<[{tokens[part]}]>" if part in tokens else f'"{part}"' for part in header)
    grammar = Grammar("p", f"start: {final} /[0-9]+/")

    def matching(stage: Stage, *answers: str) -> list[bool]:
        text = behind_thinking(grammar, HARMONY, stage, tokens).text
        return [walker.matches(text, answer) for answer in answers]

    whole = f"{ANALYSIS}a < b{NEXT}{COMMENTARY}{NEXT}{FINAL}42"
    others = (f"{ANALYSIS}a{NEXT}42", f"{ANALYSIS}42", f"{FINAL}x", "42")
    assert matching(Stage.UNDECIDED, whole, f"{FINAL}42", *others) == [True, True, False, False, False, False]
    assert matching(Stage.THINKING, f"a{NEXT}{FINAL}42", f"{NEXT}{FINAL}42", f"{FINAL}42") == [True, True, False]
