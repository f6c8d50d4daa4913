"""Grammar of answers that call functions: calls alone, or text and calls whose arguments match."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from server.errors import ApiError
from server.limits import MAX_TOOL_GRAMMAR_CHARS
from server.text.compose_grammar import compose, grammars_of
from server.text.json_schema import close_objects
from server.text.special_names import check_names
from server.text.structured import WHITESPACE, Grammar, check_grammar, compilable
from server.text.tools.functions import Function, ToolUse
from server.text.tools.parameter_values import types_of
from server.text.tools.tool_format import NO_HEADERS, GrammarWriter, Headers, ToolFormat

_PARAM = "tools"
_ANY_OBJECT = {"type": "object"}
_BESIDE_NOTHING = frozenset(
    ("$schema", "additionalProperties", "description", "properties", "required", "title", "type")
)
"""Keywords of a function without parameters."""


def checked_grammar_of_tools(
    use: ToolUse,
    form: ToolFormat,
    tokens: Mapping[str, int],
    special_names: Collection[str],
    answer: Grammar | None = None,
    write_headers: Callable[[GrammarWriter], Headers] | None = None,
) -> Grammar | None:
    """Same as grammar_of_tools, and validated. Takes up to some 100 ms: call it off the event loop. Raises ApiError.

    answer: validated before.
    """
    written_out = grammar_of_tools(use, form, {}, (), answer, write_headers)
    if written_out is None or written_out is answer:
        return answer
    check_grammar(written_out)  # the check knows no tokens of the model
    return grammar_of_tools(use, form, tokens, special_names, answer, write_headers)


def grammar_of_tools(
    use: ToolUse,
    form: ToolFormat,
    tokens: Mapping[str, int],
    special_names: Collection[str],
    answer: Grammar | None = None,
    write_headers: Callable[[GrammarWriter], Headers] | None = None,
) -> Grammar | None:
    """Return the grammar of answers that may call functions, or have to; None: nothing holds them. It is not validated
    yet. Raises ApiError.

    An answer that has to call is nothing but calls. Any other may have text too; in a format without a trigger,
    that text does not begin like a call.

    tokens: ids of the texts that the compiler takes for tokens (`Tokenizer.names_in_grammars`). special_names: those of
    them that are never part of a text. answer: grammar of an answer without calls: an answer has either that content or
    calls (where both begin alike, as JSON that has a name in both, the content wins). write_headers: writes what
    stands before text or that content, and what before calls alone; None: nothing.
    """
    beside_json = answer is not None and grammars_of(answer)[0].get("json_schema") is not None
    writer = _Writer(tokens, beside_json=beside_json)
    headers = NO_HEADERS if write_headers is None else write_headers(writer)
    if not use.is_bound and (answer is None or use.mode == "none"):
        return _behind(headers.text, writer, answer)
    functions = list(use.callable)
    check_names(_PARAM, "the name of a function", [each.name for each in functions], tokens)
    if use.mode == "required" and not functions:
        raise ApiError("tools: no function, but one has to be called", param=_PARAM)
    if use.mode != "required":
        functions = [each if each.strict else replace(each, parameters=_ANY_OBJECT) for each in functions]
    calls = writer.rule(form.calls(functions, writer, parallel=use.parallel)) if functions else None
    if calls is not None and (use.mode == "required" or answer is not None):
        start = f"{headers.calls} {_only_calls(calls, form.trigger, use.parallel, writer)}"
        start += "" if use.mode == "required" else f" | {headers.text} @content"
    elif answer is not None:
        return _behind(headers.text, writer, answer)
    else:
        ids = [id for name, id in tokens.items() if name not in special_names and name not in form.markers]
        start = _text_and_calls(calls, form, headers, use.parallel, writer, ids)
    text = "\n".join([f"start: {start}", *writer.lines])
    if len(text) > MAX_TOOL_GRAMMAR_CHARS:
        raise ApiError(f"tools: the schemas have more than {MAX_TOOL_GRAMMAR_CHARS} characters", param=_PARAM)
    if answer is None or use.mode == "required":
        return Grammar(_PARAM, text, writer.places)
    return Grammar(_PARAM, compose([text], "content", answer), {**writer.places, **answer.places})


def _only_calls(calls: str, trigger: str, parallel: bool, write: _Writer) -> str:
    if not trigger:
        return calls
    call = f"{write.text(trigger)} {calls}"
    return f'{call} ("\\n"? {call})*' if parallel else call


def _behind(header: str, writer: _Writer, answer: Grammar | None) -> Grammar | None:
    if answer is None or not header:
        return answer
    rules = [f"start: {header} @content", *writer.lines]
    return replace(answer, text=compose(["\n".join(rules)], "content", answer))


def _text_and_calls(
    calls: str | None, form: ToolFormat, headers: Headers, parallel: bool, write: _Writer, ids: Sequence[int]
) -> str:
    """ids: of tokens that text may contain."""
    marks = "|".join(re.escape(mark).replace("/", r"\/") for mark in sorted(form.markers))
    plain = f"& ~/(?s:.*)({marks})(?s:.*)/"
    other = f"<{sorted(ids)}>".replace(" ", "")
    any_text = write.terminal(f"/(?s:.+)/ {plain}")
    more = f"({other} {any_text}?)*" if ids else ""
    free = write.rule(f"{any_text}? {more}")
    if calls is None:
        return f"{headers.text} {free}"
    if not form.trigger:
        if form.begin:
            begin = re.escape(form.begin)
            first = write.terminal(rf"/[ \t\r\n]+|[ \t\r\n]*[^{begin} \t\r\n](?s:.*)/ {plain}")
            free = f"{first}? {more}"
        return f"{headers.calls} {calls} | {headers.text} {free}"
    if form.trigger in write.tokens:
        call = f"{free} {write.text(form.trigger)} {calls}"
    else:
        lead = write.terminal(f"{write.terminal(f'/(?s:.*)/ {plain}')} {json.dumps(form.trigger)}")
        before = f"({any_text}? {other})* " if ids else ""
        call = f"{before}{lead} {calls}"
    return f"{headers.text} ({call}){'*' if parallel else '?'} {free}"


class _Writer:
    """A GrammarWriter.

    lines: rules and terminals so far. places: where keywords of schemas occur first.
    """

    def __init__(self, tokens: Mapping[str, int], *, beside_json: bool) -> None:
        """tokens: ids of texts that are written as tokens, and that clients cannot prescribe. beside_json: whether
        other JSON is an alternative to calls."""
        self.tokens = tokens
        self.lines: list[str] = []
        self.places: dict[str, str] = {}
        self._beside_json = beside_json
        self._arguments: dict[str, str] = {}
        longest_first = sorted(tokens, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if tokens else None

    def text(self, text: str) -> str:
        parts = self._split.split(text) if self._split else [text]
        written = [f"<[{self.tokens[part]}]>" if i % 2 else json.dumps(part) for i, part in enumerate(parts) if part]
        return " ".join(written)

    def json_parts(self, *parts: str) -> str:
        # A lexeme that other JSON only begins would be in its way: the compiler takes the longest.
        return " ".join(map(self.text, parts)) if self._beside_json else self.text("".join(parts))

    def arguments(self, function: Function) -> str:
        if function.name not in self._arguments:
            self._arguments[function.name] = self._schema(function, function.parameters, is_whole=True)
        return self._arguments[function.name]

    def check(self, function: Function) -> None:
        self._compilable(function, function.parameters)

    def value(self, function: Function, schema: Any) -> str:
        if isinstance(schema, Mapping) and '"$ref"' in json.dumps(schema):
            root = function.parameters
            schema = {**schema, **{key: root[key] for key in ("$defs", "definitions") if key in root}}
        return self._schema(function, schema, is_whole=False)

    def rule(self, expression: str) -> str:
        return self._define(f"r{len(self.lines)}", expression)

    def terminal(self, expression: str) -> str:
        return self._define(f"T{len(self.lines)}", expression)

    def _define(self, name: str, expression: str) -> str:
        self.lines.append(f"{name}: {expression}")
        return name

    def _compilable(self, function: Function, schema: Any) -> tuple[dict[str, Any], dict[str, str]]:
        """See `compilable`."""
        try:
            return compilable(_PARAM, schema, self.tokens)
        except ApiError as error:
            reason = str(error).removeprefix(f"{_PARAM}: ")
            raise ApiError(f"{_PARAM}: function {function.name}: {reason}", param=_PARAM) from None

    def _schema(self, function: Function, schema: Any, *, is_whole: bool) -> str:
        """is_whole: whether it is that of all arguments."""
        rewritten, places = self._compilable(function, schema)
        if is_whole:
            if "object" not in types_of(rewritten, rewritten):
                reason = "expected a JSON schema of an object as its parameters"
                raise ApiError(f"{_PARAM}: function {function.name}: {reason}", param=_PARAM)
            if _has_no_parameters(rewritten):
                return self.text("{}")
            rewritten["type"] = "object"
        for key, place in places.items():
            self.places.setdefault(key, f"{function.name}: {place}")
        close_objects(rewritten)
        content = {**rewritten, "x-guidance": {"whitespace_pattern": WHITESPACE}}
        return self.rule(f"%json {json.dumps(content, ensure_ascii=False)}")


def _has_no_parameters(schema: Mapping[str, Any]) -> bool:
    listed = schema.get("properties") == {} and schema.get("additionalProperties", False) in (False, True)
    return not schema or (listed and not schema.get("required") and schema.keys() <= _BESIDE_NOTHING)
