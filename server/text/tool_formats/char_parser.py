"""Base of call parsers: it reads an answer a character at a time, so that it does not matter how the text is split."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Generator
from typing import TypeVar

from server.text.tools.functions import Function
from server.text.tools.tool_format import CallPart, Part

T = TypeVar("T")
Reading = Generator[None, str, T]
"""Coroutine that receives a character at each `yield`."""

SPACES = frozenset(" \t\r\n")


class Malformed(Exception):
    """The last character read is not what a call has there."""


class CharParser:
    """A CallParser that is a coroutine over characters.

    `_read` of a subclass takes characters with `_next`. They are held until they are given out as text, or until they
    turn out to be part of a call.
    """

    def __init__(self, functions: Collection[Function]) -> None:
        """functions: those that may be called. A call of any other is text."""
        self._functions = {function.name: function for function in functions}
        self._held: list[str] = []
        self._unread: list[str] = []
        """Characters to be read again, the next one last."""
        self._parts: list[tuple[int | None, str | None, list[str]]] = []
        """Index of a call (None: text), its name in its first part, and pieces of text or of arguments."""
        self._num_calls = 0
        self._in_call = self._after_text = False
        self._passing: tuple[re.Pattern[str], Callable[[str], None]] | None = None
        """Characters that matter next, and what takes the text before them."""
        self._reading = self._read()
        next(self._reading)

    def feed(self, text: str) -> list[Part]:
        at = 0
        while at < len(text):
            if self._passing is not None:
                stop, take = self._passing
                found = stop.search(text, at)
                end = len(text) if found is None else found.start()
                if end > at:
                    take(text[at:end])
                    at = end
                    continue
            self._reading.send(text[at])
            at += 1
        return self._take()

    def finish(self) -> list[Part]:
        is_end = self._num_calls > 0 and not self._after_text and self._holds_space()
        if not self._in_call and not is_end:
            self._give_text()
        return self._take()

    def _read(self) -> Reading[None]:
        """Read the whole answer. Never returns."""
        raise NotImplementedError

    def _next(self) -> Reading[str]:
        """Read a character, and hold it."""
        char = self._unread.pop() if self._unread else (yield)
        self._held.append(char)
        return char

    def _pass(self, stop: re.Pattern[str], take: Callable[[str], None]) -> Reading[str]:
        """Hand text to `take` until a character that `stop` matches, which is returned, and held. The text before it
        comes in larger pieces, and is not held."""
        while True:
            self._passing = stop, take
            char = yield from self._next()
            self._passing = None
            if stop.match(char):
                return char
            self._held.pop()
            take(char)

    def _back(self, count: int = 1) -> None:
        """Put back the last characters, which are read again."""
        for _ in range(count):
            self._unread.append(self._held.pop())

    def _skip_space(self) -> Reading[str]:
        """Read white space and the character after it, which is returned."""
        while (char := (yield from self._next())) in SPACES:
            pass
        return char

    def _expect(self, text: str) -> Reading[None]:
        """Read `text`. Raises Malformed."""
        for expected in text:
            if (yield from self._next()) != expected:
                raise Malformed

    def _find(self, *marks: str) -> Reading[str]:
        """Give out text until one of `marks`, none of which begins another. The mark is returned, and held; so is white
        space before it, unless there is text before that."""
        skips, mark = not self._after_text, ""
        if not skips:
            self._give_text()
        first = re.compile("[" + "".join({re.escape(each[0]) for each in marks}) + "]")
        while True:
            if skips or mark:
                char = yield from self._next()
            else:
                char = yield from self._pass(first, self._take_text)
            if skips and char in SPACES:
                continue
            skips = False
            mark += char
            if mark in marks:
                return mark
            while mark and not any(each.startswith(mark) for each in marks):
                mark = mark[1:]
                self._give_text(len(mark))

    def _match(self, mark: str) -> Reading[bool]:
        """Read `mark` if it comes next. Returns whether it does."""
        for count, expected in enumerate(mark, 1):
            if (yield from self._next()) != expected:
                self._back(count)
                return False
        return True

    def _skip_end(self, mark: str) -> Reading[None]:
        """Read white space and the mark that ends a call. Where that is missing, the call ends without it."""
        yield from self._skip_space()
        self._back()
        if (yield from self._match(mark)):
            self._held.clear()
        self._in_call = False

    def _give_text(self, held: int = 0) -> None:
        """Give out what is held as text, but for the last `held` characters."""
        end = len(self._held) - held
        if end > 0:
            text = "".join(self._held[:end])
            del self._held[:end]
            self._take_text(text)

    def _take_text(self, text: str) -> None:
        self._add_part(None, None, text)
        self._after_text = True

    def _begin_call(self, name: str) -> None:
        """Give out the name of a call. What is held belongs to the call."""
        self._held.clear()
        self._num_calls += 1
        self._add_part(self._num_calls - 1, name, "")
        self._in_call, self._after_text = True, False

    def _give_arguments(self, text: str) -> None:
        """Give out part of the arguments of the last call. What is held belongs to the call."""
        self._held.clear()
        self._add_part(self._num_calls - 1, None, text)

    def _holds_space(self) -> bool:
        return SPACES.issuperset(self._held)

    def _add_part(self, index: int | None, name: str | None, text: str) -> None:
        if self._parts and self._parts[-1][0] == index:
            self._parts[-1][2].append(text)
        else:
            self._parts.append((index, name, [text]))

    def _take(self) -> list[Part]:
        taken: list[Part] = []
        for index, name, texts in self._parts:
            text = "".join(texts)
            taken.append(text if index is None else CallPart(index, name, text))
        self._parts.clear()
        return taken
