"""Calls as gpt-oss writes them: messages to functions (OpenAI's harmony format).

<|channel|>commentary to=functions.now <|constrain|>json<|message|>{}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from server.text.thinking.harmony_thinking import (
    CALL,
    CHANNEL,
    FUNCTIONS,
    MAX_HEADER,
    MESSAGE,
    RECIPIENT,
    HarmonyThinking,
    write_type,
)
from server.text.tool_formats.char_parser import Malformed, Reading
from server.text.tool_formats.hermes import HermesFormat
from server.text.tool_formats.json_calls import JsonCallParser
from server.text.tools.functions import Function
from server.text.tools.tool_format import CallParser, GrammarWriter
from server.text.tools.tool_messages import as_tools, for_template, one_call_each


class HarmonyFormat(HermesFormat):
    """Format of models whose template writes channels. They end an answer after one call, so grammars have one."""

    name = "harmony"
    markers = HarmonyThinking.marks
    trigger = begin = ""

    def recognises(self, template: str) -> bool:
        return HarmonyThinking().recognises(template)

    def prepare(
        self, messages: Sequence[Mapping[str, Any]], functions: Sequence[Function]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
        prepared = one_call_each(for_template(messages))
        for message in prepared:
            thinking = message.pop("reasoning_content", None)
            if message.get("tool_calls"):  # the template takes one text, and writes it as thinking
                texts = filter(None, (thinking, message["content"]))
                message["thinking"], message["content"] = "\n\n".join(texts), ""
            elif thinking:
                message["thinking"] = thinking
        return prepared, as_tools(functions)

    def calls(self, functions: Sequence[Function], write: GrammarWriter, *, parallel: bool) -> str:
        return write.rule(" | ".join(self._call(function, write) for function in functions))

    def _call(self, function: Function, write: GrammarWriter) -> str:
        channel = f'{write.text(CHANNEL)} ("commentary" | "analysis")'
        recipient = write.text(f" to={FUNCTIONS}{function.name}")
        end = f"{write_type(write)} {write.text(MESSAGE)}"
        return f"({channel} {recipient} | {recipient} {channel}) {end} {write.arguments(function)}"

    def parser(self, functions: Sequence[Function]) -> CallParser:
        return _Parser(functions)


class _Parser(JsonCallParser):
    def _read(self) -> Reading[None]:
        while True:
            mark = yield from self._find(CHANNEL, f"to={FUNCTIONS}")
            yield from self._read_message(mark)
            self._in_call = False
            if not self._holds_space():
                self._give_text()

    def _read_message(self, header: str) -> Reading[None]:
        """Read the rest of a header, and a call. What is no call stays held."""
        self._name, self._began, self._waiting = None, False, []
        try:
            while not header.endswith(MESSAGE):
                char = yield from self._next()
                header += char
                if len(header) > MAX_HEADER:
                    raise Malformed
            found = RECIPIENT.search(header)
            name = found[1].removeprefix(FUNCTIONS) if found and found[1].startswith(FUNCTIONS) else ""
            if name not in self._functions:
                return
            self._name = name
            char = yield from self._skip_space()
            yield from self._read_arguments(char)
            yield from self._skip_end(CALL)
        except Malformed:
            self._back()
