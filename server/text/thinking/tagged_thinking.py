"""Thinking between two tags at the beginning of an answer, such as `<think>` and `</think>`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from server.text.held_back import overlap
from server.text.thinking.thinking_format import (
    Kind,
    Mark,
    Part,
    Span,
    Stage,
    ThinkingSplitter,
    rules_of_thinking,
    write_mark,
)
from server.text.tools.tool_format import NO_HEADERS, GrammarWriter, Headers


class TaggedThinking:
    """Format of models that think between two texts."""

    thinks = True

    def __init__(self, name: str, begin: str, end: str) -> None:
        self.name, self.begin, self.end = name, begin, end
        self.marks = frozenset((begin, end))

    def recognises(self, template: str) -> bool:
        return self.end in template

    def stage_of(self, prompt: str, prefill: str | None) -> Stage:
        if prefill is not None:
            if prefill.rfind(self.begin) > prefill.rfind(self.end):
                return Stage.THINKING
            return Stage.CONTENT if prefill.strip() else Stage.UNDECIDED
        written = prompt.rstrip()
        if written.endswith(self.begin):
            return Stage.THINKING
        return Stage.CONTENT if written.endswith(self.end) else Stage.UNDECIDED

    def splitter(self, stage: Stage) -> ThinkingSplitter:
        return _Splitter(self.begin, self.end, stage)

    def headers(self, stage: Stage, write: GrammarWriter) -> Headers:
        return NO_HEADERS

    def rules(self, stage: Stage, tokens: Mapping[str, int]) -> list[str]:
        if stage is Stage.THINKING:
            start = "start: thinking SPACE @answer"
        else:
            start = f"start: (SPACE {write_mark(self.begin, tokens)} thinking SPACE)? @answer"
        return [start, r"SPACE: /[ \n]*/", *rules_of_thinking(self.end, tokens)]


class _Splitter:
    def __init__(self, begin: str, end: str, stage: Stage) -> None:
        self._begin_mark, self._end_mark = begin, end
        self._stage = stage
        self.thinking = [Span(0)] if stage is Stage.THINKING else []
        self.content_start = 0 if stage is Stage.CONTENT else None
        self._held = ""
        self._taken = 0  # characters before those held back
        self._trims = stage is Stage.THINKING  # leading spaces

    @property
    def decided(self) -> int:
        return 0 if self._stage is Stage.UNDECIDED else self._taken + len(self._held)

    def feed(self, text: str, marks: Sequence[Mark] = ()) -> list[Part]:
        if self._stage is Stage.CONTENT and not self._held and not self._trims:
            self._taken += len(text)
            return [self._content(text)]
        self._held += text
        parts: list[Part] = []
        if self._stage is Stage.UNDECIDED:
            parts.append(self._content(self._begin()))
        if self._stage is Stage.THINKING:
            parts.append(Part(Kind.THINKING, self._think()))
        if self._stage is Stage.CONTENT:
            parts.append(self._content(self._take(len(self._held))))
        return parts

    def finish(self) -> list[Part]:
        rest = self._take(len(self._held))
        thinks = self._stage is Stage.THINKING
        return [Part(Kind.THINKING, rest.rstrip()) if thinks else self._content(rest)]

    def _begin(self) -> str:
        """Decide whether the answer begins with thinking."""
        begin, written = self._begin_mark, self._held.lstrip()
        if written.startswith(begin):
            self._take(len(self._held) - len(written) + len(begin))
            self._stage, self._trims = Stage.THINKING, True
            self.thinking = [Span(0)]
        elif not begin.startswith(written):
            self._stage, self.content_start = Stage.CONTENT, 0
            return self._take(len(self._held))
        return ""

    def _think(self) -> str:
        mark = self._end_mark
        found = self._held.find(mark)
        if found >= 0:
            thinking = self._take(found).rstrip()
            self._trims = False
            self._take(len(mark))
            self._stage, self._trims = Stage.CONTENT, True
            self.thinking, self.content_start = [Span(0, self._taken)], self._taken
            return thinking
        certain = self._held[: len(self._held) - overlap(self._held, mark)].rstrip()
        return self._take(len(certain))

    def _content(self, text: str) -> Part:
        """Create a part of text that was just taken."""
        return Part(Kind.CONTENT, text, place=(self._taken - len(text), self._taken))

    def _take(self, count: int) -> str:
        taken, self._held = self._held[:count], self._held[count:]
        self._taken += count
        if self._trims:
            taken = taken.lstrip()
            self._trims = not taken
        return taken
