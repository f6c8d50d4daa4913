"""One answer of a chat, parsed while it arrives: thinking, content, calls of functions."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from server.text.thinking.thinking_format import Kind, Mark, ThinkingSplitter
from server.text.tools.tool_format import CallParser, CallPart
from server.text.tools.tool_messages import parse_object


@dataclass(frozen=True, slots=True)
class CallDelta:
    """Part of a call.

    index: number of the call in the answer. id, name: in the first part of each call, None in all others. arguments:
    JSON text, whose parts join to the whole."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class AnswerDelta:
    """What one piece of text added to an answer.

    parts: content and parts of calls, in their order; texts are not empty. They follow the thinking.
    """

    thinking: str = ""
    parts: Sequence[str | CallDelta] = ()

    @property
    def content(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def calls(self) -> list[CallDelta]:
        return [part for part in self.parts if isinstance(part, CallDelta)]

    def __bool__(self) -> bool:
        return bool(self.thinking or self.parts)


class AnswerParser:
    """Parser of one answer.

    thinking_tokens: number of its tokens so far that belong to the thinking, its marks included. has_calls: whether it
    has called a function.
    """

    def __init__(
        self,
        splitter: ThinkingSplitter,
        new_calls: Callable[[], CallParser] | None,
        new_id: Callable[[], str],
        *,
        only_calls: bool = False,
    ) -> None:
        """new_calls: makes a parser of calls; None: whatever the content looks like, it is text. only_calls: whether a
        grammar allows nothing else: text is then the beginning of a call that has no name yet, and is left out."""
        self._splitter, self._new_calls, self._new_id = splitter, new_calls, new_id
        self._calls = None if new_calls is None else new_calls()
        self._before = self._num_calls = 0  # calls before those of this parser of calls, and all calls
        self._span = 0  # of the thinking, in which undecided tokens may be
        self._only_calls = only_calls
        self.thinking_tokens = 0
        self._undecided: deque[int] = deque()  # offsets of tokens that may belong to the thinking
        self.has_calls = False
        self._arguments: list[str] = []  # of the last call
        self._blank = ""  # spaces and line breaks that are content only if other text follows before a call

    @property
    def content_start(self) -> int | None:
        """Offset in the text at which the content begins; None: the thinking has not ended yet."""
        return self._splitter.content_start

    @property
    def breaks_off(self) -> bool:
        """Whether the last call has not all of its arguments."""
        return self.has_calls and parse_object("".join(self._arguments)) is None

    def feed(self, text: str, offsets: Sequence[int], marks: Sequence[Mark] = (), *, ends: bool) -> AnswerDelta:
        """Parse more text. offsets: those of its tokens in the answer's text. marks: those of them that are marks of
        thinking. ends: whether nothing follows."""
        split = self._splitter.feed(text, marks)
        if ends:
            split += self._splitter.finish()
        self._count(offsets, ends)
        thinking = "".join(part.text for part in split if part.kind is Kind.THINKING)
        parts: list[CallPart | str] = []
        for kind, content, begins in split:
            if begins and self._new_calls is not None:
                parts += self._end_calls()
                self._calls = self._new_calls()
            if kind is Kind.CONTENT and self._calls is not None:
                parts += self._numbered(self._calls.feed(content))
            elif kind is not Kind.THINKING and content:
                parts.append(content)
        if ends:
            parts += self._end_calls()
        if self._calls is None:
            content = "".join(part for part in parts if isinstance(part, str))
            return AnswerDelta(thinking, [content] if content else ())
        return self._sort(thinking, parts, ends)

    def _count(self, offsets: Sequence[int], ends: bool) -> None:
        """Count the tokens of the thinking."""
        self._undecided += offsets
        while self._undecided and (ends or self._undecided[0] < self._splitter.decided):
            offset, spans = self._undecided.popleft(), self._splitter.thinking
            while self._span < len(spans) and (end := spans[self._span].end) is not None and end <= offset:
                self._span += 1
            self.thinking_tokens += self._span < len(spans) and spans[self._span].begin <= offset

    def _end_calls(self) -> list[CallPart | str]:
        """Return what the parser of calls holds back; its calls have ended."""
        if self._calls is None:
            return []
        rest = self._numbered(self._calls.finish())
        self._before = self._num_calls
        return rest

    def _numbered(self, parts: Iterable[CallPart | str]) -> list[CallPart | str]:
        """Number calls through all parsers of calls."""
        numbered: list[CallPart | str] = []
        for part in parts:
            if isinstance(part, CallPart):
                part = replace(part, index=self._before + part.index)
                self._num_calls = max(self._num_calls, part.index + 1)
            numbered.append(part)
        return numbered

    def _sort(self, thinking: str, parts: Sequence[str | CallPart], ends: bool) -> AnswerDelta:
        ordered: list[str | CallDelta] = []
        for part in parts:
            if isinstance(part, str) and self._only_calls:
                continue
            if isinstance(part, str):
                text = self._blank + part
                self._blank = text[len(text.rstrip()) :]
                if visible := text.rstrip():
                    ordered.append(visible)
                continue
            self._blank = ""
            self.has_calls = True
            new_id = None if part.name is None else self._new_id()
            if new_id is not None:
                self._arguments = []
            self._arguments.append(part.arguments)
            ordered.append(CallDelta(part.index, new_id, part.name, part.arguments))
        if ends and not self.has_calls and self._blank:
            ordered.append(self._blank)
            self._blank = ""
        return AnswerDelta(thinking, ordered)
