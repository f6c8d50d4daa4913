"""Calls as Mistral's models write them: [TOOL_CALLS] and an array, or in newer ones a name and its arguments."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import string
from collections.abc import Mapping, Sequence
from typing import Any

from server.text.tool_formats.char_parser import Malformed, Reading
from server.text.tool_formats.json_calls import JsonCallParser, write_call
from server.text.tools.functions import Function
from server.text.tools.tool_format import CallParser, GrammarWriter
from server.text.tools.tool_messages import as_tools, for_template

_BEGIN, _ID, _ARGUMENTS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
_ALPHANUMERIC = string.ascii_letters + string.digits
_VALID_ID = re.compile(r"[a-zA-Z0-9]{9}")
_NAME_CHARS = frozenset(_ALPHANUMERIC + "_-.")


class MistralFormat:
    """Format of models whose template has [TOOL_CALLS]."""

    name = "mistral"
    markers = frozenset((_BEGIN, _ID, _ARGUMENTS))
    trigger = _BEGIN
    begin = ""

    def recognises(self, template: str) -> bool:
        return _BEGIN in template

    def prepare(
        self, messages: Sequence[Mapping[str, Any]], functions: Sequence[Function]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
        prepared = for_template(messages)
        for message in prepared:
            if "tool_call_id" in message:
                message["tool_call_id"] = _valid_id(message["tool_call_id"])
            for call in message.get("tool_calls", ()):
                call["id"] = _valid_id(call.get("id"))
        return prepared, as_tools(functions)

    def new_id(self) -> str:
        return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(9))

    def calls(self, functions: Sequence[Function], write: GrammarWriter, *, parallel: bool) -> str:
        call = write.rule(" | ".join(write_call(function, write) for function in functions))
        more = f'(", " {call})*' if parallel else ""
        # A newer model takes the form that it was trained on; it begins differently.
        named = (f"{write.text(function.name + _ARGUMENTS)} {write.arguments(function)}" for function in functions)
        return f'(" "? "[" {call} {more} "]" | {" | ".join(named)})'

    def parser(self, functions: Sequence[Function]) -> CallParser:
        return _Parser(functions)


def _valid_id(given: Any) -> str:
    """Return an id in the form that templates accept; always the same one for what a client gave."""
    if isinstance(given, str) and _VALID_ID.fullmatch(given):
        return given
    digest = hashlib.sha256(json.dumps(given).encode()).digest()
    return "".join(_ALPHANUMERIC[byte % len(_ALPHANUMERIC)] for byte in digest[:9])


class _Parser(JsonCallParser):
    def _read(self) -> Reading[None]:
        while True:
            yield from self._find(_BEGIN)
            char = yield from self._skip_space()
            if char == "[":
                yield from self._read_list()
            else:
                self._back()
                yield from self._read_call() if char == "{" else self._read_named()
            self._in_call = False
            if not self._holds_space():
                self._give_text()

    def _read_list(self) -> Reading[None]:
        """Read the rest of an array of calls. What belongs to none stays held."""
        while (yield from self._read_call()):
            self._in_call = False
            char = yield from self._skip_space()
            if char not in ",]":
                self._back()
                return
            self._held.clear()
            if char == "]":
                return

    def _read_named(self) -> Reading[None]:
        """Read a name and its arguments. What is no call stays held."""
        self._name, self._began, self._waiting = None, False, []
        try:
            name = yield from self._read_word()
            if name not in self._functions:
                return
            self._name = name
            if (yield from self._match(_ID)):
                yield from self._read_word()
            yield from self._match(_ARGUMENTS)
            if (char := (yield from self._skip_space())) != "{":
                raise Malformed
            yield from self._read_arguments(char)
        except Malformed:
            self._back()

    def _read_word(self) -> Reading[str]:
        word = ""
        while (char := (yield from self._next())) in _NAME_CHARS and len(word) <= 64:
            word += char
        self._back()
        return word
