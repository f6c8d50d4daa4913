"""One answer of a chat, parsed while it arrives: thinking, content, calls of functions."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
        calls: CallParser | None,
        new_id: Callable[[], str],
        *,
        only_calls: bool = False,
    ) -> None:
        """calls: None: whatever the content looks like, it is text. only_calls: whether a grammar allows nothing else:
        text is then the beginning of a call that has no name yet, and is left out."""
        self._splitter, self._calls, self._new_id = splitter, calls, new_id
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
        for kind, content in split:
            if kind is Kind.CONTENT and self._calls is not None:
                parts += self._calls.feed(content)
            elif kind is not Kind.THINKING and content:
                parts.append(content)
        if ends and self._calls is not None:
            parts += self._calls.finish()
        if self._calls is None:
            content = "".join(part for part in parts if isinstance(part, str))
            return AnswerDelta(thinking, [content] if content else ())
        return self._sort(thinking, parts, ends)

    def _count(self, offsets: Sequence[int], ends: bool) -> None:
        """Count the tokens of the thinking."""
        self._undecided += offsets
        while self._undecided and (ends or self._undecided[0] < self._splitter.decided):
            offset = self._undecided.popleft()
            spans = self._splitter.thinking
            self.thinking_tokens += any(begin <= offset and (end is None or offset < end) for begin, end in spans)

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
