"""Answers that are content alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from server.text.thinking.thinking_format import Kind, Mark, Part, Span, Stage, ThinkingSplitter
from server.text.tools.tool_format import NO_HEADERS, GrammarWriter, Headers


class NoThinking:
    """Format of models that do not think, or whose thinking is part of their content."""

    name = "none"
    marks = frozenset[str]()
    thinks = False

    def recognises(self, template: str) -> bool:
        return True

    def stage_of(self, prompt: str, prefill: str | None) -> Stage:
        return Stage.CONTENT

    def splitter(self, stage: Stage) -> ThinkingSplitter:
        return _Splitter()

    def headers(self, stage: Stage, write: GrammarWriter) -> Headers:
        return NO_HEADERS

    def rules(self, stage: Stage, tokens: Mapping[str, int]) -> list[str]:
        return ["start: @answer"]


class _Splitter:
    def __init__(self) -> None:
        self.thinking: list[Span] = []
        self.content_start: int | None = 0
        self.decided = 0

    def feed(self, text: str, marks: Sequence[Mark] = ()) -> list[Part]:
        self.decided += len(text)
        return [Part(Kind.CONTENT, text, place=(self.decided - len(text), self.decided))]

    def finish(self) -> list[Part]:
        return []
