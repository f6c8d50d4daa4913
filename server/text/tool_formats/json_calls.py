"""Read calls that are JSON objects with a name and arguments, while they arrive."""

from __future__ import annotations

import json
import re

from server.text.tool_formats.char_parser import SPACES, CharParser, Malformed, Reading
from server.text.tools.functions import Function
from server.text.tools.tool_format import GrammarWriter

_ARGUMENTS = ("arguments", "parameters")
"""Keys of the arguments; families differ."""
_ESCAPES = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", '"': '"', "\\": "\\", "/": "/"}
_IN_STRING, _OUTSIDE_STRINGS = re.compile(r'["\\]'), re.compile(r'["{}\[\]]')
"""Characters that matter in a JSON string and outside strings."""
_HIGH, _LOW = range(0xD800, 0xDC00), range(0xDC00, 0xE000)
"""Halves of a character that JSON escapes as two."""


def write_call(function: Function, write: GrammarWriter, key: str = "arguments") -> str:
    """Write the expression of a call. key: of its arguments."""
    begin = write.json_parts("{", '"name"', ":", " ", json.dumps(function.name), ",", " ", json.dumps(key), ":", " ")
    return f"{begin} {write.arguments(function)} {write.text('}')}"


class JsonCallParser(CharParser):
    """Base of parsers of calls in JSON. The keys of a call may come in any order, and others beside them."""

    _name: str | None = None
    """Name of the call that is being read, once it is known."""
    _began = False
    """Whether its arguments have begun."""

    def _read_call(self) -> Reading[bool]:
        """Read an object. Returns whether it is a call; if it is not, all of it is held.

        A call that breaks off after it was given out ends there. The character that does not fit is left unread.
        """
        self._name, self._began, self._waiting = None, False, list[str]()
        before = self._num_calls
        try:
            yield from self._read_object()
        except Malformed:
            self._back()
            if self._num_calls > before and not self._holds_space():
                self._give_text()
            return self._num_calls > before
        self._held.clear()
        return True

    def _read_object(self) -> Reading[None]:
        if (yield from self._skip_space()) != "{":
            raise Malformed
        char = ","
        while char == ",":
            if (yield from self._skip_space()) != '"':
                raise Malformed
            key = yield from self._read_string()
            if (yield from self._skip_space()) != ":":
                raise Malformed
            first = yield from self._skip_space()
            if key == "name":
                yield from self._read_name(first)
            elif key in _ARGUMENTS:
                yield from self._read_arguments(first)
            else:
                yield from self._skip_value(first)
            char = yield from self._skip_space()
        if char != "}" or self._name is None:
            raise Malformed
        if not self._began:
            self._pass_on("{}")

    def _read_name(self, first: str) -> Reading[None]:
        if self._name is not None or first != '"':
            raise Malformed
        name = yield from self._read_string()
        if name not in self._functions:
            raise Malformed
        self._name = name
        if self._began:
            self._begin_call(name)
            self._give_arguments("".join(self._waiting))

    def _read_arguments(self, first: str) -> Reading[None]:
        """Read arguments after their first character, and pass them on."""
        if self._began:
            raise Malformed
        if first == "{":
            self._pass_on("{")
            yield from self._read_nested(passes_on=True)
        elif first == '"':
            yield from self._read_encoded()
        elif first == "n":
            yield from self._expect("ull")
            self._pass_on("{}")
        else:
            raise Malformed

    def _pass_on(self, arguments: str) -> None:
        """Give out part of the arguments, once the name is known."""
        if self._name is None:
            self._waiting.append(arguments)
        else:
            if not self._began:
                self._begin_call(self._name)
            self._give_arguments(arguments)
        self._began = True

    def _read_nested(self, *, passes_on: bool = False) -> Reading[None]:
        """Read the rest of an object or array."""
        depth, in_string = 1, False
        while depth:
            stop = _IN_STRING if in_string else _OUTSIDE_STRINGS
            char = yield from self._pass(stop, self._take_arguments if passes_on else self._held.append)
            if char == "\\":
                char += yield from self._next()
            elif char == '"':
                in_string = not in_string
            else:
                depth += (char in "{[") - (char in "}]")
            if passes_on:
                self._pass_on(char)

    def _take_arguments(self, text: str) -> None:
        if self._name is None:
            self._held.append(text)
        self._pass_on(text)

    def _read_encoded(self) -> Reading[None]:
        """Read arguments that are a JSON string of an object, and pass on the object."""
        while (char := (yield from self._next())) != '"':
            if char == "\\":
                char = yield from self._read_escaped()
            if not self._began and char in SPACES:
                continue
            if not self._began and char != "{":
                raise Malformed
            self._pass_on(char)
        if not self._began:
            self._pass_on("{}")

    def _read_escaped(self) -> Reading[str]:
        """Read what follows a backslash. Returns the character that it stands for."""
        char = yield from self._next()
        if char != "u":
            if char not in _ESCAPES:
                raise Malformed
            return _ESCAPES[char]
        code = yield from self._read_code()
        if code in _HIGH:
            for count, expected in enumerate("\\u", 1):
                if (yield from self._next()) != expected:
                    self._back(count)
                    return "\ufffd"
            low = yield from self._read_code()
            if low in _LOW:
                return chr(0x10000 + ((code - _HIGH.start) << 10) + low - _LOW.start)
            self._back(6)
        return "\ufffd" if code in _HIGH or code in _LOW else chr(code)

    def _read_code(self) -> Reading[int]:
        digits = ""
        for _ in range(4):
            digits += yield from self._next()
            if digits[-1] not in "0123456789abcdefABCDEF":
                raise Malformed
        return int(digits, 16)

    def _read_string(self) -> Reading[str]:
        """Read the rest of a string on one line."""
        chars: list[str] = []
        while (char := (yield from self._next())) != '"':
            if char < " ":
                raise Malformed
            if char == "\\":
                char += yield from self._next()
            chars.append(char)
        try:
            return str(json.loads('"' + "".join(chars) + '"'))
        except ValueError:
            raise Malformed from None

    def _skip_value(self, first: str) -> Reading[None]:
        """Read a value after its first character."""
        if first == '"':
            yield from self._read_string()
        elif first in "{[":
            yield from self._read_nested()
        else:
            while first.isalnum() or first in "+-.":
                first = yield from self._next()
            self._back()
