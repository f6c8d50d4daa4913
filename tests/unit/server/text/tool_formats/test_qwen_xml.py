"""Calls whose parameters are tags."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from server.text.tool_formats.qwen_xml import QwenXmlFormat
from server.text.tools.functions import Function
from server.text.tools.parameter_values import to_json, types_of
from server.text.tools.tool_format import CallPart
from tests.support.profiles import whole_test_only_in_all
from tests.support.tool_walks import Call, check_parser, parse


def called(name: str, **values: str) -> str:
    parameters = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>"


def weather(**arguments: Any) -> Call:
    return "get_weather", json.dumps(arguments, ensure_ascii=False)


OSLO, NOW = called("get_weather", city="Oslo"), called("now")
OSLO_CALL, NOW_CALL = weather(city="Oslo"), ("now", "{}")

ANSWERS: dict[str, tuple[str, list[str | Call]]] = {
    "nothing": ("", []),
    "text": ("Hello <b>, <function> <tool_call", ["Hello <b>, <function> <tool_call"]),
    "one call": (OSLO, [OSLO_CALL]),
    "no parameters": (NOW, [NOW_CALL]),
    "text before, between and after": (
        f"Let me see.\n{OSLO}\nAnd:\n{NOW} Done.",
        ["Let me see.\n", OSLO_CALL, "\nAnd:\n", NOW_CALL, " Done."],
    ),
    "several calls": (f"\n{OSLO}\n{NOW}\n{OSLO}\n", [OSLO_CALL, NOW_CALL, OSLO_CALL]),
    "several calls in one": (
        OSLO.replace("\n</tool_call>", "") + "\n" + NOW.replace("<tool_call>\n", ""),
        [OSLO_CALL, NOW_CALL],
    ),
    "no beginning": (
        f"Hm. {OSLO.removeprefix('<tool_call>').lstrip()} x",
        ["Hm. ", OSLO_CALL, " x"],
    ),
    "no end": (OSLO.removesuffix("\n</tool_call>") + " x", [OSLO_CALL, " x"]),
    "no end of the function": (OSLO.replace("</function>\n", ""), [OSLO_CALL]),
    "values of all types": (
        called("get_weather", city="1", days="7", unit="C", where='{"a": [1, {"b": "}"}]}', note="null", exact="false"),
        [weather(city="1", days=7, unit="C", where={"a": [1, {"b": "}"}]}, note=None, exact=False)],
    ),
    "values of other types": (
        called("get_weather", city="null", days="many", unit="7", where="[1]", note="5", exact="True"),
        [weather(city="null", days="many", unit="7", where=[1], note="5", exact=True)],
    ),
    "unknown parameters": (called("get_weather", a="1", b="x y", c='"q"'), [weather(a=1, b="x y", c="q")]),
    "unicode, quotes and lines": (
        called("get_weather", city='Ørsta "å" \\n\\ 🙂\n\n\tb\n', note="a\nb\x0c"),
        [weather(city='Ørsta "å" \\n\\ 🙂\n\n\tb\n', note="a\nb\x0c")],
    ),
    "empty values": (called("get_weather", city="", note=""), [weather(city="", note="")]),
    "no lines": (
        "<tool_call><function=get_weather><parameter=city>Oslo</parameter><parameter=days>7</parameter></function>"
        "</tool_call>",
        [weather(city="Oslo", days=7)],
    ),
    "marks in strings": (
        called("get_weather", city="</tool_call><function=now></function> </parameter", where='{"a": "</parameter>"}'),
        [weather(city="</tool_call><function=now></function> </parameter", where={"a": "</parameter>"})],
    ),
    "escaped quotes before a mark": (
        called("get_weather", where='{"a\\"": "\\\\</parameter>\\""}'),
        [weather(where={'a"': '\\</parameter>"'})],
    ),
    "a quote that stays open": (called("get_weather", note='6" or so'), [weather(note='6" or so')]),
    "nested JSON": (called("a.b-c_1", x='[\n  {"y": {"z": []}}\n]'), [("a.b-c_1", '{"x": [\n  {"y": {"z": []}}\n]}')]),
    "truncated in a string": (
        OSLO[: OSLO.index("lo\n")],
        [("get_weather", '{"city": "Os')],
    ),
    "truncated in a value": (
        called("get_weather", days="12")[:55],
        [("get_weather", '{"days": ')],
    ),
    "truncated in a name": ("<tool_call>\n<function=get_we", ["<tool_call>\n<function=get_we"]),
    "truncated before the end": (OSLO[:-16], [("get_weather", '{"city": "Oslo"')]),
    "broken tag of the function": ("<tool_call>\n<function get>\n", ["<tool_call>\n<function get>\n"]),
    "an unknown function": (called("then", a="1"), [called("then", a="1")]),
    "broken tag of a parameter": (
        "<tool_call>\n<function=now>\n<parameter=a\nb>",
        [("now", "{"), "\n<parameter=a\nb>"],
    ),
    "text in a call": (
        "<tool_call>\n<function=now>\nhm\n</function>\n</tool_call>",
        [("now", "{"), "\nhm\n</function>\n</tool_call>"],
    ),
    "JSON in the mark": (
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
        ['<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'],
    ),
    "a mark, then a call": (f"<tool_call>\n{NOW}", ["<tool_call>\n", NOW_CALL]),
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_answers(answer: str, encode: Callable[[str], list[str]]) -> None:
    check_parser(QwenXmlFormat(), *ANSWERS[answer], encode)


def test_strings_are_passed_on_as_they_come() -> None:
    parser = QwenXmlFormat().parser([Function("f", {"properties": {"a": {"type": "string"}}})])
    begin, value = "<tool_call>\n<function=f>\n<parameter=a>", '\nx"\n<y'
    assert parser.feed(begin) == [CallPart(0, "f", '{"a": "')]
    assert [parser.feed(char) for char in value] == [
        [],
        [CallPart(0, None, "x")],
        [CallPart(0, None, '\\"')],
        [],
        [],
        [CallPart(0, None, "\\n<y")],
    ]


@pytest.mark.parametrize(
    ("schema", "types"),
    [
        ({"type": "string"}, "string"),
        ({"type": ["string", "null"]}, "null string"),
        ({"type": "number"}, "integer number"),
        ({"enum": ["a", 1]}, "integer string"),
        ({"const": 1.5}, "number"),
        ({"anyOf": [{"type": "string", "format": "date"}, {"$ref": "#/$defs/B"}]}, "boolean string"),
        ({"allOf": [{"type": ["string", "null"]}, {"type": ["string", "array"]}]}, "string"),
        ({"oneOf": [{"$ref": "#/$defs/Loop"}, {"type": "null"}]}, "array boolean integer null number object string"),
        ({"$ref": "#/$defs/a~1b"}, "object"),
        ({}, "array boolean integer null number object string"),
        (None, "array boolean integer null number object string"),
    ],
)
def test_types(schema: Any, types: str) -> None:
    definitions = {"B": {"type": "boolean"}, "a/b": {"type": "object"}, "Loop": {"$ref": "#/$defs/Loop"}}
    assert " ".join(sorted(types_of(schema, {"$defs": definitions}))) == types


def test_schemas_that_refer_to_each_other_are_read_once() -> None:
    definitions = {str(i): {"anyOf": [{"$ref": f"#/$defs/{i + 1}"}] * 20} for i in range(12)}
    assert "string" in types_of({"$ref": "#/$defs/0"}, {"$defs": definitions})


@pytest.mark.parametrize(
    ("text", "types", "value"),
    [
        ("5", "string", "5"),
        (" 5 ", "integer", 5),
        ("5.0", "integer", 5.0),
        ("5", "string null", "5"),
        ("None", "null", None),
        ("None", "string null", "None"),
        ("NaN", "number", "NaN"),
        ("[" * 100_000, "array", "[" * 100_000),
        ('"a"', "string integer", "a"),
        ("'a'", "array", "'a'"),
    ],
)
def test_values(text: str, types: str, value: Any) -> None:
    assert json.loads(to_json(text, types.split())) == value


def test_arguments_that_are_no_object_become_one() -> None:
    calls = [{"function": {"name": "f", "arguments": text}} for text in ('{"a": 1}', '{"a": ', "[1]")]
    (message,), _ = QwenXmlFormat().prepare([{"role": "assistant", "content": None, "tool_calls": calls}], [])
    assert [call["function"]["arguments"] for call in message["tool_calls"]] == [
        {"a": 1},
        {"arguments": '{"a": '},
        {"arguments": "[1]"},
    ]


@whole_test_only_in_all
def test_long_answers_take_time_in_proportion() -> None:
    value = "\n<</</para</parameter" * 20_000
    (call,) = parse(
        QwenXmlFormat().parser([Function("f", {"properties": {"a": {"type": "string"}}})]), [called("f", a=value)]
    )
    assert isinstance(call, CallPart)
    assert json.loads(call.arguments) == {"a": value}
