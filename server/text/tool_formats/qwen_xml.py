"""Calls as Qwen3-Coder writes them: a tag for the function and one for each parameter, whose strings have no quotes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from server.text.tool_formats.char_parser import CharParser, Reading
from server.text.tool_formats.hermes import BEGIN, END, HermesFormat
from server.text.tool_formats.xml_grammar import write_parameters
from server.text.tools.functions import Function
from server.text.tools.parameter_values import is_text, quote, schema_of, to_json, types_of
from server.text.tools.tool_format import CallParser, GrammarWriter

_FUNCTION, _FUNCTION_END = "<function=", "</function>"
_PARAMETER, _PARAMETER_END = "<parameter=", "</parameter>"
_MAY_END_TEXT = re.compile(r"[\n<]")
_MAX_LABEL = 256
"""Length of the name of a function or parameter."""


class QwenXmlFormat(HermesFormat):
    """Format of models whose template has <function=…> and <parameter=…>. They sometimes leave out <tool_call>."""

    name = "qwen_xml"
    markers = frozenset((BEGIN, END, _FUNCTION))
    trigger = BEGIN

    def recognises(self, template: str) -> bool:
        return _FUNCTION in template and _PARAMETER in template

    def prepare(
        self, messages: Sequence[Mapping[str, Any]], functions: Sequence[Function]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
        prepared, tools = super().prepare(messages, functions)
        for message in prepared:
            for call in message.get("tool_calls", ()):
                arguments = call["function"].get("arguments")
                if isinstance(arguments, str):  # the template takes objects alone
                    call["function"]["arguments"] = {"arguments": arguments}
        return prepared, tools

    def calls(self, functions: Sequence[Function], write: GrammarWriter, *, parallel: bool) -> str:
        calls = " | ".join(
            f"{write.text(f'{_FUNCTION}{function.name}>')} {write_parameters(function, write)}"
            for function in functions
        )
        begin, end = write.text("\n"), write.text(f"\n{_FUNCTION_END}\n{END}")
        return f"{begin} ({calls}) {end}"

    def parser(self, functions: Sequence[Function]) -> CallParser:
        return _Parser(functions)


class _Parser(CharParser):
    def _read(self) -> Reading[None]:
        while True:
            mark = yield from self._find(BEGIN, _FUNCTION)
            if mark == BEGIN:
                yield from self._skip_space()
                self._back()
            if mark == BEGIN and not (yield from self._match(_FUNCTION)):
                self._give_text()
                continue
            name = yield from self._read_label()
            if name not in self._functions:
                self._give_text()
                continue
            self._begin_call(name)
            yield from self._read_parameters(self._functions[name])
            yield from self._skip_end(END)

    def _read_label(self) -> Reading[str]:
        """Read a name and the > after it; without that, the name is empty."""
        label = ""
        while (char := (yield from self._next())) not in "<>\n" and len(label) < _MAX_LABEL:
            label += char
        if char == ">":
            return label
        self._back()
        return ""

    def _read_parameters(self, function: Function) -> Reading[None]:
        """Read parameters up to the function's end, and pass them on as an object. The object stays open where
        something else follows."""
        separator = ""
        self._give_arguments("{")
        while True:
            yield from self._skip_space()
            self._back()
            if not (yield from self._match(_PARAMETER)):
                break
            label = yield from self._read_label()
            if not label:
                self._give_text()
                return
            self._give_arguments(f"{separator}{quote(label)}: ")
            separator = ", "
            schema = schema_of(label, function.parameters)
            if is_text(schema, function.parameters):
                yield from self._pass_on_text()
            else:
                value = yield from self._read_value()
                self._give_arguments(to_json(value, types_of(schema, function.parameters)))
        if (yield from self._match(_FUNCTION_END)) or (yield from self._match(END)):
            self._give_arguments("}")

    def _pass_on_text(self) -> Reading[None]:
        """Read a string up to its parameter's end, and pass it on in quotes."""
        self._give_arguments('"')
        if (yield from self._next()) != "\n":
            self._back()
        while True:
            yield from self._pass(_MAY_END_TEXT, self._give_quoted)
            self._back()
            if (yield from self._match(f"\n{_PARAMETER_END}")) or (yield from self._match(_PARAMETER_END)):
                break
            self._give_quoted((yield from self._next()))
        self._give_arguments('"')

    def _give_quoted(self, text: str) -> None:
        self._give_arguments(quote(text)[1:-1])

    def _read_value(self) -> Reading[str]:
        """Read a value up to its parameter's end. In a JSON string, which is on one line, that is no end."""
        chars: list[str] = []
        quoted = False
        while quoted or not (yield from self._match(_PARAMETER_END)):
            char = yield from self._next()
            if char == '"':
                quoted = not quoted
            elif char == "\n":
                quoted = False
            elif char == "\\" and quoted:
                char += yield from self._next()
            chars.append(char)
        return "".join(chars).removeprefix("\n").removesuffix("\n")
