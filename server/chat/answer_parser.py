"""One answer of a chat, parsed while it arrives: thinking, content, calls of functions."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from server.text.thinking.thinking_format import Kind, Mark, ThinkingSplitter
from server.text.tools.tool_format import CallParser, CallPart
from server.text.tools.tool_messages import parse_object

Place = tuple[int, int]
"""A range of an answer's text, in characters."""


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

    parts: content and parts of calls, in their order; texts are not empty. They follow the thinking. places: where each
    text in `parts` stands, which may begin with a gap that has no place; None: not known, since a parser of calls has
    read it; empty: none is known.
    """

    thinking: str = ""
    parts: Sequence[str | CallDelta] = ()
    places: Sequence[Place | None] = ()

    @property
    def content(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def calls(self) -> list[CallDelta]:
        return [part for part in self.parts if isinstance(part, CallDelta)]

    def __bool__(self) -> bool:
        return bool(self.thinking or self.parts)


class _Text(NamedTuple):
    """Content. place: see AnswerDelta."""

    text: str
    place: Place | None


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
        # Spaces and line breaks that are content only if other text follows before a call.
        self._blank: list[_Text] = []

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
        parts: list[CallPart | _Text] = []
        for kind, content, begins, place in split:
            if begins and self._new_calls is not None:
                parts += self._end_calls()
                self._calls = self._new_calls()
            if kind in (Kind.CONTENT, Kind.CALL) and self._calls is not None:
                parts += self._numbered(self._calls.feed(content))
            elif kind is not Kind.THINKING and content:
                parts.append(_Text(content, place))
        if ends:
            parts += self._end_calls()
        if self._calls is None:
            joined = _join(part for part in parts if isinstance(part, _Text))
        else:
            joined = self._sort(parts, ends)
        return AnswerDelta(
            thinking,
            [part.text if isinstance(part, _Text) else part for part in joined],
            [part.place for part in joined if isinstance(part, _Text)],
        )

    def _count(self, offsets: Sequence[int], ends: bool) -> None:
        """Count the tokens of the thinking."""
        self._undecided += offsets
        while self._undecided and (ends or self._undecided[0] < self._splitter.decided):
            offset, spans = self._undecided.popleft(), self._splitter.thinking
            while self._span < len(spans) and (end := spans[self._span].end) is not None and end <= offset:
                self._span += 1
            self.thinking_tokens += self._span < len(spans) and spans[self._span].begin <= offset

    def _end_calls(self) -> list[CallPart | _Text]:
        """Return what the parser of calls holds back; its calls have ended."""
        if self._calls is None:
            return []
        rest = self._numbered(self._calls.finish())
        self._before = self._num_calls
        return rest

    def _numbered(self, parts: Iterable[CallPart | str]) -> list[CallPart | _Text]:
        """Number calls through all parsers of calls."""
        numbered: list[CallPart | _Text] = []
        for part in parts:
            if isinstance(part, str):
                numbered.append(_Text(part, None))
                continue
            numbered.append(replace(part, index=self._before + part.index))
            self._num_calls = max(self._num_calls, self._before + part.index + 1)
        return numbered

    def _sort(self, parts: Iterable[CallPart | _Text], ends: bool) -> list[CallDelta | _Text]:
        """Leave out text that is none, and give calls their ids."""
        ordered: list[CallDelta | _Text] = []
        for part in parts:
            if isinstance(part, _Text):
                if not self._only_calls:
                    ordered += self._without_blank(part)
                continue
            self._blank = []
            self.has_calls = True
            new_id = None if part.name is None else self._new_id()
            if new_id is not None:
                self._arguments = []
            self._arguments.append(part.arguments)
            ordered.append(CallDelta(part.index, new_id, part.name, part.arguments))
        if ends and not self.has_calls:
            ordered += self._blank
            self._blank = []
        return _join(ordered)

    def _without_blank(self, part: _Text) -> list[_Text]:
        """Return a text without spaces and line breaks at its end, which wait, behind those that have waited for it."""
        visible = part.text.rstrip()
        rest = part.text[len(visible) :]
        before = behind = None
        if part.place is not None:
            begin, end = part.place
            middle = max(begin, end - len(rest))
            before, behind = (begin, middle), (middle, end)
        shown = [*self._blank, _Text(visible, before)] if visible else []
        waiting = [_Text(rest, behind)] if rest else []
        self._blank = waiting if visible else self._blank + waiting
        return shown


def _join(parts: Iterable[CallDelta | _Text]) -> list[CallDelta | _Text]:
    """Join texts that follow each other in the answer's text, or whose places are not known."""
    joined: list[CallDelta | _Text] = []
    for part in parts:
        last = joined[-1] if joined else None
        if not isinstance(part, _Text) or not isinstance(last, _Text):
            joined.append(part)
        elif last.place is None and part.place is None:
            joined[-1] = _Text(last.text + part.text, None)
        elif last.place is not None and part.place is not None and last.place[1] == part.place[0]:
            joined[-1] = _Text(last.text + part.text, (last.place[0], part.place[1]))
        else:
            joined.append(part)
    return joined
