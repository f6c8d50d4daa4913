"""Calls as Llama 3.1 to 3.3 write them: the whole answer is one JSON object, or several, with `parameters`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from server.text.tools.char_parser import Reading
from server.text.tools.functions import Function
from server.text.tools.hermes import HermesFormat
from server.text.tools.json_calls import JsonCallParser, write_call
from server.text.tools.tool_format import CallParser, GrammarWriter
from server.text.tools.tool_messages import as_tools, for_template

_TAG = "<|python_tag|>"
"""May precede calls."""


class LlamaJsonFormat(HermesFormat):
    """Format of models whose template writes the arguments of earlier calls as `parameters`."""

    name = "llama_json"
    markers = frozenset((_TAG,))
    trigger = ""

    def recognises(self, template: str) -> bool:
        return "<|start_header_id|>" in template and '"parameters": ' in template

    def prepare(
        self, messages: Sequence[Mapping[str, Any]], functions: Sequence[Function]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
        return _one_call_each(for_template(messages)), as_tools(functions)

    def calls(self, functions: Sequence[Function], write: GrammarWriter, *, parallel: bool) -> str:
        call = write.rule(" | ".join(write_call(function, write, "parameters") for function in functions))
        return f'{call} (("; " | "\\n") {call})*' if parallel else call

    def parser(self, functions: Sequence[Function]) -> CallParser:
        return _Parser(functions)


def _one_call_each(messages: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Split messages of several calls, which the template refuses, into one for each call, its result after it."""
    groups: list[list[dict[str, Any]]] = []
    group_of: dict[Any, list[dict[str, Any]]] = {}
    """Message of each call that was split off, by the id of the call."""
    for message in messages:
        calls = message.get("tool_calls", ())
        if message.get("role") == "tool" and (group := group_of.pop(message.get("tool_call_id"), None)) is not None:
            group.append(message)
            continue
        if len(calls) < 2:
            groups.append([message])
            continue
        group_of = {}
        for i, call in enumerate(calls):
            groups.append([{**message, "content": "" if i else message["content"], "tool_calls": [call]}])
            group_of[call.get("id")] = groups[-1]
    return [message for group in groups for message in group]


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
