"""The slot of thinking formats: where in an answer a family of models thinks, which is no part of its content.

A format is one file, and a line in `thinking_registry`. It recognises its models by their chat template, splits answers
that arrive in pieces, and says in a grammar what may stand before content.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from enum import Enum
from typing import NamedTuple, Protocol

from server.text.compose_grammar import compose
from server.text.structured import Grammar


class Stage(Enum):
    """Where in an answer its text stands."""

    UNDECIDED = 0  # at its beginning: it may think first
    THINKING = 1
    CONTENT = 2


class Split(NamedTuple):
    """Parts of a piece of text."""

    thinking: str
    content: str


class ThinkingSplitter(Protocol):
    """Splits one answer, which arrives in pieces, into thinking and content. Its parts join to the same, wherever the
    text is split; spaces and line breaks beside the marks of thinking belong to neither.

    stage: of the text so far.
    """

    stage: Stage

    @property
    def thinking_end(self) -> int | None:
        """Number of characters up to the end of the thinking and its mark; None: not yet known."""

    @property
    def content_start(self) -> int | None:
        """Number of characters up to the content, before which may be more marks; None: not yet known."""

    def feed(self, text: str) -> Split:
        """Return what is certain after more text."""

    def finish(self) -> Split:
        """Return what was held back, at the end of the text. Thinking that has not ended stays thinking."""


class ThinkingFormat(Protocol):
    """How a family of models thinks.

    name: value of the setting `server.thinking` that selects it. marks: texts around thinking and content; where they
    are names of special tokens, answers show them only to the splitter. content_header: the mark that content needs
    before it, after thinking or without; empty: none.
    """

    name: str
    marks: frozenset[str]
    content_header: str

    def recognises(self, template: str) -> bool:
        """Whether a chat template is that of a model which thinks like this."""

    def stage_of(self, prompt: str, prefill: str | None) -> Stage:
        """Return the stage in which the answer to a prompt begins. prefill: the part of the answer that the prompt ends
        with, None: none."""

    def splitter(self, stage: Stage) -> ThinkingSplitter:
        """Create a splitter of an answer that begins in a stage."""

    def rules(self, stage: Stage, tokens: Mapping[str, int]) -> list[str]:
        """Write a grammar of answers that may think first, if they begin in this stage, which is not CONTENT. Its first
        rule, `start`, refers to all that follows the thinking as @answer. tokens: see Tokenizer.names_in_grammars."""


def behind_thinking(answer: Grammar, format: ThinkingFormat, stage: Stage, tokens: Mapping[str, int]) -> Grammar:
    """Return a grammar of outputs that may think first, and then match `answer`. tokens: see
    Tokenizer.names_in_grammars."""
    if stage is Stage.CONTENT:
        return answer
    return replace(answer, text=compose(format.rules(stage, tokens), "answer", answer))


def rules_of_thinking(end: str, tokens: Mapping[str, int]) -> list[str]:
    """Write the rule `thinking`: any text up to the mark `end`, which is part of it."""
    text = re.escape(end).replace("/", r"\/")
    if end in tokens:  # the same text in other tokens would end the thinking too
        return [f"thinking: TEXT <[{tokens[end]}]>", f"TEXT: /(?s:.*)/ & ~/(?s:.*){text}(?s:.*)/"]
    return [f"thinking[lazy]: /(?s:.*){text}/"]
