"""Calls as Hermes, Qwen2.5 and Qwen3 write them: JSON between <tool_call> and </tool_call>, with text around."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from server.text.tool_formats.char_parser import Reading
from server.text.tool_formats.json_calls import JsonCallParser, write_call
from server.text.tools.functions import Function
from server.text.tools.tool_format import CallParser, GrammarWriter
from server.text.tools.tool_messages import as_tools, for_template

BEGIN, END = "<tool_call>", "</tool_call>"


class HermesFormat:
    """Format of models whose template has <tool_call> and JSON with arguments; others put other things there."""

    name = "hermes"
    markers = frozenset((BEGIN, END))
    trigger = BEGIN
    begin = ""

    def recognises(self, template: str) -> bool:
        return BEGIN in template and '"arguments": ' in template.replace("\\", "")

    def prepare(
        self, messages: Sequence[Mapping[str, Any]], functions: Sequence[Function]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
        return for_template(messages), as_tools(functions)

    def new_id(self) -> str:
        return f"call_{secrets.token_hex(12)}"

    def calls(self, functions: Sequence[Function], write: GrammarWriter, *, parallel: bool) -> str:
        calls = " | ".join(write_call(function, write) for function in functions)
        begin, end = write.text("\n"), write.text("\n" + END)
        return f"{begin} ({calls}) {end}"

    def parser(self, functions: Sequence[Function]) -> CallParser:
        return _Parser(functions)


class _Parser(JsonCallParser):
    def _read(self) -> Reading[None]:
        while True:
            yield from self._find(BEGIN)
            if (yield from self._read_call()):
                yield from self._skip_end(END)
            else:
                self._give_text()
