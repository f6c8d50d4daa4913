"""Thinking: text between `<think>` and `</think>` at the beginning of an answer, which is no part of its content."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Literal, NamedTuple

from server.text.compose_grammar import compose
from server.text.held_back import overlap
from server.text.structured import Grammar


@dataclass(frozen=True, slots=True)
class ThinkingFormat:
    """The texts between which a family of models thinks."""

    begin: str
    end: str


THINK = ThinkingFormat("<think>", "</think>")
"""That of Qwen3, DeepSeek-R1 and many others."""


def choose_thinking(setting: Literal["auto", "think", "none"], template: str | None) -> ThinkingFormat | None:
    """Choose the format of a model. auto: that which its chat template mentions. None: answers are content only."""
    if setting == "none" or (setting == "auto" and THINK.end not in (template or "")):
        return None
    return THINK


class Stage(Enum):
    """Where in an answer its text stands."""

    UNDECIDED = 0  # at its beginning: it may think first
    THINKING = 1
    CONTENT = 2


def stage_of(format: ThinkingFormat | None, prompt: str, prefill: str | None) -> Stage:
    """Return the stage in which the answer to a prompt begins. prefill: the part of the answer that the prompt ends
    with, None: none."""
    if format is None:
        return Stage.CONTENT
    if prefill is not None:
        if prefill.rfind(format.begin) > prefill.rfind(format.end):
            return Stage.THINKING
        return Stage.CONTENT if prefill.strip() else Stage.UNDECIDED
    written = prompt.rstrip()
    if written.endswith(format.begin):
        return Stage.THINKING
    return Stage.CONTENT if written.endswith(format.end) else Stage.UNDECIDED


class Split(NamedTuple):
    """Parts of a piece of text."""

    thinking: str
    content: str


class ThinkingSplitter:
    """Splits one answer, which arrives in pieces, into thinking and content. Its parts join to the same, wherever the
    text is split; spaces and line breaks beside the marks of thinking belong to neither.

    stage: of the text so far. end: number of characters up to the end of the thinking; None: not yet known.
    """

    def __init__(self, format: ThinkingFormat | None, stage: Stage) -> None:
        self._format = format
        self.stage = stage if format is not None else Stage.CONTENT
        self.end: int | None = 0 if self.stage is Stage.CONTENT else None
        self._held = ""
        self._taken = 0  # characters before those held back
        self._trims = self.stage is Stage.THINKING  # leading spaces

    def feed(self, text: str) -> Split:
        """Return what is certain after more text."""
        if self.stage is Stage.CONTENT and not self._held and not self._trims:
            self._taken += len(text)
            return Split("", text)
        self._held += text
        thinking = content = ""
        if self.stage is Stage.UNDECIDED:
            content += self._begin()
        if self.stage is Stage.THINKING:
            thinking = self._think()
        if self.stage is Stage.CONTENT:
            content += self._take(len(self._held))
        return Split(thinking, content)

    def finish(self) -> Split:
        """Return what was held back, at the end of the text. Thinking that has not ended stays thinking."""
        rest = self._take(len(self._held))
        return Split(rest.rstrip(), "") if self.stage is Stage.THINKING else Split("", rest)

    def _begin(self) -> str:
        """Decide whether the answer begins with thinking."""
        assert self._format is not None
        begin, written = self._format.begin, self._held.lstrip()
        if written.startswith(begin):
            self._take(len(self._held) - len(written) + len(begin))
            self.stage, self._trims = Stage.THINKING, True
        elif not begin.startswith(written):
            self.stage, self.end = Stage.CONTENT, 0
            return self._take(len(self._held))
        return ""

    def _think(self) -> str:
        assert self._format is not None
        mark = self._format.end
        found = self._held.find(mark)
        if found >= 0:
            thinking = self._take(found).rstrip()
            self._trims = False
            self._take(len(mark))
            self.stage, self.end, self._trims = Stage.CONTENT, self._taken, True
            return thinking
        certain = self._held[: len(self._held) - overlap(self._held, mark)].rstrip()
        return self._take(len(certain))

    def _take(self, count: int) -> str:
        taken, self._held = self._held[:count], self._held[count:]
        self._taken += count
        if self._trims:
            taken = taken.lstrip()
            self._trims = not taken
        return taken


def behind_thinking(answer: Grammar, format: ThinkingFormat | None, stage: Stage, tokens: Mapping[str, int]) -> Grammar:
    """Return a grammar of outputs that may think first, and then match `answer`. tokens: see
    Tokenizer.names_in_grammars."""
    if format is None or stage is Stage.CONTENT:
        return answer
    rules = [r"SPACE: /[ \n]*/"]
    end = re.escape(format.end).replace("/", r"\/")
    if format.end in tokens:  # the same text in other tokens would end the thinking too
        rules += [f"thinking: TEXT <[{tokens[format.end]}]>", f"TEXT: /(?s:.*)/ & ~/(?s:.*){end}(?s:.*)/"]
    else:
        rules += [f"thinking[lazy]: /(?s:.*){end}/"]
    if stage is Stage.THINKING:
        start = "start: thinking SPACE @answer"
    else:
        begin = f"<[{tokens[format.begin]}]>" if format.begin in tokens else json.dumps(format.begin)
        start = f"start: (SPACE {begin} thinking SPACE)? @answer"
    return replace(answer, text=compose([start, *rules], "answer", answer))
