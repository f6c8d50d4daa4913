"""Messages in channels are split into thinking and content, wherever the text is cut."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.tokenizer import Tokenizer
from server.text.structured import Grammar
from server.text.thinking.harmony_thinking import HarmonyThinking
from server.text.thinking.thinking_format import Stage, ThinkingSplitter, behind_thinking
from tests.support.tool_walks import Walker, write_tool_tokenizer

HARMONY = HarmonyThinking()
ANALYSIS, COMMENTARY, FINAL = (f"<|channel|>{name}<|message|>" for name in ("analysis", "commentary", "final"))
NEXT = "<|end|><|start|>assistant"
CALL = "<|channel|>commentary to=functions.now <|constrain|>json<|message|>{}"
OTHER = " to=functions.now<|channel|>commentary json<|message|>{}"
PYTHON = "<|channel|>analysis to=python code<|message|>1"

ANSWERS = {
    "thinking and content": (f"{ANALYSIS}Six times seven.{NEXT}{FINAL}42", "Six times seven.", "42"),
    "content": (f"{FINAL}4 <|2|> <b>", "", "4 <|2|> <b>"),
    "content that ends": (f"{ANALYSIS}a{NEXT}{FINAL}b<|end|>", "a", "b"),
    "content that returns": (f"{FINAL}b<|return|>", "", "b"),
    "a constraint of content": ('<|channel|>final <|constrain|>json<|message|>{"a": 1}', "", '{"a": 1}'),
    "several messages": (f"{ANALYSIS}a{NEXT}{COMMENTARY}b{NEXT}{ANALYSIS}c{NEXT}{FINAL}d", "a\n\nb\n\nc", "d"),
    "empty thinking": (f"{ANALYSIS}{NEXT}{ANALYSIS} \n{NEXT}{FINAL}d", "", "d"),
    "spaces beside marks": (f"\n{ANALYSIS} a \n{NEXT}{FINAL}\nb ", "a", "b "),
    "no end of the thinking": (f"{ANALYSIS}a{FINAL}b", "a", "b"),
    "no end, but a start": (f"{ANALYSIS}a<|start|>assistant{FINAL}b", "a", "b"),
    "a call": (f"{ANALYSIS}a{NEXT}{CALL}", "a", CALL),
    "a call that ends": (f"{CALL}<|call|>", "", f"{CALL}<|call|>"),
    "a call in another order": (
        f"{ANALYSIS}a{NEXT}{OTHER}",
        "a",
        OTHER,
    ),
    "a call in the channel of thinking": (PYTHON, "", PYTHON),
    "text behind content": (f"{FINAL}a{NEXT}{FINAL}b", "", f"a<|start|>assistant{FINAL}b"),
    "a call in another order, without thinking": (OTHER, "", OTHER),
    "another's message": (f"{ANALYSIS}a<|end|><|start|>user<|message|>b", "a", "<|start|>user<|message|>b"),
    "another channel": ("<|channel|>verse<|message|>a", "", "a"),
    "no channel": ("<|message|>a", "", "a"),
    "plain text": ("It is 42.", "", "It is 42."),
    "plain text with a mark": (f"It is {FINAL}", "", f"It is {FINAL}"),
    "a line break in a header": ("<|channel|>final\n<|message|>a", "", "<|channel|>final\n<|message|>a"),
    "cut in a header": ("<|channel|>ana", "", ""),
    "cut in a second header": (f"{ANALYSIS}a{NEXT}<|channel|>fi", "a", ""),
    "cut in thinking": (f"{ANALYSIS}a b ", "a b", ""),
    "cut in a mark": (f"{ANALYSIS}a <|en", "a <|en", ""),
    "nothing": ("", "", ""),
}  # fmt: skip


def split(pieces: list[str], stage: Stage) -> tuple[str, str, ThinkingSplitter]:
    splitter = HARMONY.splitter(stage)
    parts = [splitter.feed(piece) for piece in pieces] + [splitter.finish()]
    return "".join(part.thinking for part in parts), "".join(part.content for part in parts), splitter


@pytest.mark.parametrize("answer", ANSWERS)
def test_answers_split_the_same_at_every_place(answer: str) -> None:
    text, thinking, content = ANSWERS[answer]
    for size in range(1, len(text) + 2):
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        assert split(pieces, Stage.UNDECIDED)[:2] == (thinking, content), pieces


PARTS = [
    *("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>", "<|constrain|>"),
    *("assistant", "analysis", "final", "commentary", " to=functions.now", "\n", " ", "<", "|", "a", "42 is it"),
    *(ANALYSIS, FINAL, NEXT, CALL),
]


@given(st.lists(st.sampled_from(PARTS), max_size=12), st.sampled_from(Stage), st.data())
def test_cuts_change_nothing(parts: list[str], stage: Stage, data: st.DataObject) -> None:
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = split([text], stage)
    for cut in (split(pieces, stage), split(list(text), stage)):
        assert cut[:2] == whole[:2]
        for name in ("stage", "thinking_end", "content_start"):
            assert getattr(cut[2], name) == getattr(whole[2], name)
    # Nothing is lost but headers, marks, and spaces beside them.
    words = re.sub(r"<\|start\|>[^<\n]*|<\|channel\|>[^<\n]*|<\|constrain\|>[^<\n]*|<\|\w+\|>|\s", "", text)
    left = "".join((whole[0] + whole[1]).split())
    assert all(left.count(word) >= words.count(word) for word in ("42isit",))


def test_the_places_of_thinking_and_content_are_known_in_characters() -> None:
    text = f"{ANALYSIS}abc{NEXT}{FINAL}d"
    splitter = split([text], Stage.UNDECIDED)[2]
    assert splitter.thinking_end == text.index("<|start|>")
    assert splitter.content_start == len(text) - 1
    assert split([text[:30]], Stage.UNDECIDED)[2].content_start is None
    assert (split([f"{FINAL}d"], Stage.UNDECIDED)[2].thinking_end, split(["d"], Stage.UNDECIDED)[2].content_start) == (
        0,
        0,
    )


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
    assert split([" b", "<|end|>"], Stage.CONTENT)[:2] == ("", " b")
    assert split([f"a{NEXT}{FINAL}b"], Stage.THINKING)[:2] == ("a", "b")


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
    assert matching(
        Stage.UNDECIDED, whole, f"{FINAL}42", f"{ANALYSIS}a{NEXT}42", f"{ANALYSIS}42", f"{FINAL}x", "42"
    ) == [
        *(True, True),
        *(False, False, False, False),
    ]
    assert matching(Stage.THINKING, f"a{NEXT}{FINAL}42", f"{NEXT}{FINAL}42", f"{FINAL}42") == [True, True, False]
