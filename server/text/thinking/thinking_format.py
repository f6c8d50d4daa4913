"""The slot of thinking formats: where in an answer a family of models thinks, which is no part of its content.

A format is one file, and a line in `thinking_registry`. It recognises its models by their chat template, splits answers
that arrive in pieces, and says in a grammar what may stand before content.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import Enum
from typing import NamedTuple, Protocol

from server.text.compose_grammar import compose
from server.text.structured import Grammar
from server.text.tools.tool_format import GrammarWriter, Headers


class Stage(Enum):
    """Where in an answer its text stands."""

    UNDECIDED = 0  # at its beginning: it may think first
    THINKING = 1
    CONTENT = 2


class Kind(Enum):
    """Kind of a part of an answer."""

    THINKING = 0
    PLAIN = 1  # content without calls, whatever it looks like
    CONTENT = 2  # content that may have calls
    CALL = 3  # a message that is a call, or content if it turns out to be none


class Part(NamedTuple):
    """Part of an answer. begins: whether calls before it have ended, complete or not. place: of all kinds but thinking,
    the range of the answer's text that it is, in characters; empty if it is no part of that."""

    kind: Kind
    text: str
    begins: bool = False
    place: tuple[int, int] = (0, 0)


class Mark(NamedTuple):
    """A special token of ThinkingFormat.marks. offset: in the answer's text, which shows it by its name."""

    offset: int
    name: str


class Span(NamedTuple):
    """A range of the answer's text, in characters. end: None: it goes on."""

    begin: int
    end: int | None = None


class ThinkingSplitter(Protocol):
    """Splits one answer, which arrives in pieces, into thinking and content. Its parts join to the same, wherever the
    text is split; spaces and line breaks beside the marks of thinking belong to neither.

    thinking: ranges of the text so far, their marks included. content_start: offset of the content; None: not yet
    known. decided: number of characters for which it is known whether they are thinking.
    """

    thinking: list[Span]
    content_start: int | None

    @property
    def decided(self) -> int: ...

    def feed(self, text: str, marks: Sequence[Mark] = ()) -> list[Part]:
        """Return what is certain after more text. marks: of the tokens that came with it; their own text may come
        later."""

    def finish(self) -> list[Part]:
        """Return what was held back, at the end of the text. Thinking that has not ended stays thinking."""


class ThinkingFormat(Protocol):
    """How a family of models thinks.

    name: value of the setting `server.thinking` that selects it. marks: texts around thinking and content; where they
    are names of special tokens, answers show them only to the splitter. thinks: whether there may be thinking.
    """

    name: str
    marks: frozenset[str]
    thinks: bool

    def recognises(self, template: str) -> bool:
        """Whether a chat template is that of a model which thinks like this."""

    def stage_of(self, prompt: str, prefill: str | None) -> Stage:
        """Return the stage in which the answer to a prompt begins. prefill: the part of the answer that the prompt ends
        with, None: none."""

    def splitter(self, stage: Stage) -> ThinkingSplitter:
        """Create a splitter of an answer that begins in a stage."""

    def headers(self, stage: Stage, write: GrammarWriter) -> Headers:
        """Write what stands before content, in an answer that begins in a stage."""

    def rules(self, stage: Stage, tokens: Mapping[str, int]) -> list[str]:
        """Write a grammar of answers that may think first, if they begin in this stage, which is not CONTENT. Its first
        rule, `start`, refers to all that follows the thinking as @answer. tokens: see Tokenizer.names_in_grammars."""


def behind_thinking(answer: Grammar, format: ThinkingFormat, stage: Stage, tokens: Mapping[str, int]) -> Grammar:
    """Return a grammar of outputs that may think first, and then match `answer`. tokens: see
    Tokenizer.names_in_grammars."""
    if stage is Stage.CONTENT:
        return answer
    return replace(answer, text=compose(format.rules(stage, tokens), "answer", answer))


def write_mark(name: str, tokens: Mapping[str, int]) -> str:
    """Write a mark in a grammar: the token with this name, or else its text."""
    return f"<[{tokens[name]}]>" if name in tokens else json.dumps(name)


def rules_of_thinking(end: str, tokens: Mapping[str, int]) -> list[str]:
    """Write the rule `thinking`: any text up to the mark `end`, which is part of it."""
    text = re.escape(end).replace("/", r"\/")
    if end in tokens:  # the same text in other tokens would end the thinking too
        return [f"thinking: TEXT {write_mark(end, tokens)}", f"TEXT: /(?s:.*)/ & ~/(?s:.*){text}(?s:.*)/"]
    return [f"thinking[lazy]: /(?s:.*){text}/"]
