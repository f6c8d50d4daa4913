"""Calls as Llama 3.1 to 3.3 write them: the whole answer is one JSON object, or several, with `parameters`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from server.text.tool_formats.char_parser import Reading
from server.text.tool_formats.hermes import HermesFormat
from server.text.tool_formats.json_calls import JsonCallParser, write_call
from server.text.tools.functions import Function
from server.text.tools.tool_format import CallParser, GrammarWriter
from server.text.tools.tool_messages import as_tools, for_template, one_call_each

_TAG = "<|python_tag|>"
"""May precede calls."""


class LlamaJsonFormat(HermesFormat):
    """Format of models whose template writes the arguments of earlier calls as `parameters`."""

    name = "llama_json"
    markers = frozenset((_TAG,))
    trigger = ""
    begin = "{"

    def recognises(self, template: str) -> bool:
        return "<|start_header_id|>" in template and '"parameters": ' in template

    def prepare(
        self, messages: Sequence[Mapping[str, Any]], functions: Sequence[Function]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
        return one_call_each(for_template(messages)), as_tools(functions)

    def calls(self, functions: Sequence[Function], write: GrammarWriter, *, parallel: bool) -> str:
        call = write.rule(" | ".join(write_call(function, write, "parameters") for function in functions))
        return f'{call} (("; " | "\\n") {call})*' if parallel else call

    def parser(self, functions: Sequence[Function]) -> CallParser:
        return _Parser(functions)


class _Parser(JsonCallParser):
    def _read(self) -> Reading[None]:
        while True:
            yield from self._read_calls()
            yield from self._find(_TAG)

    def _read_calls(self) -> Reading[None]:
        while True:
            char = yield from self._skip_space()
            self._back()
            if char != "{" or not (yield from self._read_call()):
                break
            self._in_call = False
            if (yield from self._skip_space()) != ";":
                self._back()
        if not self._holds_space():
            self._give_text()
