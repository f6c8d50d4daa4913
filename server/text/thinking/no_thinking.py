"""Answers that are content alone."""

from __future__ import annotations

from collections.abc import Mapping

from server.text.thinking.thinking_format import Split, Stage, ThinkingSplitter


class NoThinking:
    """Format of models that do not think, or whose thinking is part of their content."""

    name = "none"
    marks = frozenset[str]()
    content_header = ""

    def recognises(self, template: str) -> bool:
        return True

    def stage_of(self, prompt: str, prefill: str | None) -> Stage:
        return Stage.CONTENT

    def splitter(self, stage: Stage) -> ThinkingSplitter:
        return _Splitter()

    def rules(self, stage: Stage, tokens: Mapping[str, int]) -> list[str]:
        raise AssertionError("there is no stage before the content")


class _Splitter:
    def __init__(self) -> None:
        self.stage = Stage.CONTENT
        self.thinking_end: int | None = 0
        self.content_start: int | None = 0

    def feed(self, text: str) -> Split:
        return Split("", text)

    def finish(self) -> Split:
        return Split("", "")
