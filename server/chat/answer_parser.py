"""One answer of a chat, parsed while it arrives: thinking, content, calls of functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from server.text.thinking.thinking_format import Split, Stage, ThinkingSplitter
from server.text.tools.tool_format import CallParser, Part
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

    thinking_tokens: number of its tokens so far that belong to the thinking, the mark of its end included. has_calls:
    whether it has called a function.
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
        self._offsets: list[int] = []  # of tokens that may belong to the thinking
        self._counted = False
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

    def feed(self, text: str, offsets: Sequence[int], *, ends: bool) -> AnswerDelta:
        """Parse more text. offsets: those of its tokens in the answer's text. ends: whether nothing follows."""
        split = self._splitter.feed(text)
        if ends:
            rest = self._splitter.finish()
            split = Split(split.thinking + rest.thinking, split.content + rest.content)
        self._count(offsets)
        if self._calls is None:
            return AnswerDelta(split.thinking, [split.content] if split.content else ())
        parts = self._calls.feed(split.content)
        if ends:
            parts += self._calls.finish()
        return self._sort(split.thinking, parts, ends)

    def _count(self, offsets: Sequence[int]) -> None:
        """Count the tokens of the thinking: those that begin before its end."""
        if self._counted:
            return
        self._offsets += offsets
        end = self._splitter.thinking_end
        self._counted = end is not None and self._splitter.stage is Stage.CONTENT
        of_thinking = self._offsets if end is None else [offset for offset in self._offsets if offset < end]
        self.thinking_tokens = len(of_thinking) if self._splitter.stage is not Stage.UNDECIDED else 0
        if self._counted:
            self._offsets = []

    def _sort(self, thinking: str, parts: Sequence[Part], ends: bool) -> AnswerDelta:
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
