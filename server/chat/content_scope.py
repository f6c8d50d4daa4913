"""The part of an answer that its stop strings match."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from engine.text import Seen
from server.text.thinking.thinking_format import Kind, Mark, Part, ThinkingSplitter


class ContentScope:
    """Finds the content of an answer (engine.text.StopScope): neither its thinking, nor marks and headers around that.

    A message that is a call is no content either. Calls that models write as part of their content are.
    """

    def __init__(self, splitter: ThinkingSplitter, names: Mapping[int, str], *, has_calls: bool) -> None:
        """splitter: of this answer, and of no other reader. names: of tokens that are marks of thinking. has_calls:
        whether messages may be calls; else, they are content."""
        self._splitter, self._names = splitter, names
        self._hidden = {Kind.THINKING, Kind.CALL} if has_calls else {Kind.THINKING}

    @property
    def decided(self) -> int:
        return self._splitter.decided

    def feed(self, text: str, token: int, offset: int) -> list[Seen]:
        name = self._names.get(token)
        return self._seen(self._splitter.feed(text, [] if name is None else [Mark(offset, name)]))

    def finish(self, text: str) -> list[Seen]:
        return self._seen([*self._splitter.feed(text), *self._splitter.finish()])

    def _seen(self, parts: Iterable[Part]) -> list[Seen]:
        return [Seen(part.text, *part.place) for part in parts if part.kind not in self._hidden]
