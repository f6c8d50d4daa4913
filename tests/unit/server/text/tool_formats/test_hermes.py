"""Calls between <tool_call> and </tool_call>."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from server.text.tool_formats.hermes import HermesFormat
from server.text.tools.functions import Function
from server.text.tools.tool_format import CallPart, Part
from tests.support.profiles import whole_test_only_in_all
from tests.support.tool_walks import OFFERED, Call, check_parser, parse

OSLO = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
OSLO_CALL, NOW_CALL = ("get_weather", '{"city": "Oslo"}'), ("now", "{}")


def called(text: str) -> str:
    return f"<tool_call>\n{text}\n</tool_call>"


ANSWERS: dict[str, tuple[str, list[str | Call]]] = {
    "nothing": ("", []),
    "text": ("Hello, <b>you</b> < me.\n", ["Hello, <b>you</b> < me.\n"]),
    "white space": (" \n\n", [" \n\n"]),
    "one call": (OSLO, [OSLO_CALL]),
    "white space around": (f"\n\n{OSLO}\n", [OSLO_CALL]),
    "text before, between and after": (
        f"Let me see.\n{OSLO}\nAnd the time:\n{NOW} Done.",
        ["Let me see.\n", OSLO_CALL, "\nAnd the time:\n", NOW_CALL, " Done."],
    ),
    "several calls": (f"{OSLO}\n{OSLO}\n\n{NOW}", [OSLO_CALL, OSLO_CALL, NOW_CALL]),
    "unicode and escapes": (
        called('{"name": "get_weather", "arguments": {"city": "Ørsta \\u00e5 \\"🙂\\" \\\\"}}'),
        [("get_weather", '{"city": "Ørsta \\u00e5 \\"🙂\\" \\\\"}')],
    ),
    "nested objects": (
        called('{"name": "get_weather", "arguments": {"where": {"a": [{"b": "}]"}, {}]}, "city": "{"}}'),
        [("get_weather", '{"where": {"a": [{"b": "}]"}, {}]}, "city": "{"}')],
    ),
    "name after arguments": (
        called('{"arguments": {"city": "Oslo"}, "name": "get_weather"}'),
        [OSLO_CALL],
    ),
    "other keys": (
        called('{"id": "a}", "type": {"a": ["]"]}, "n": -1.5e3, "t": true, "name": "now", "x": [], "arguments": {}}'),
        [NOW_CALL],
    ),
    "parameters": (called('{"name": "get_weather", "parameters": {"city": "Oslo"}}'), [OSLO_CALL]),
    "no arguments": (called('{"name": "now"}'), [NOW_CALL]),
    "null": (called('{"name": "now", "arguments": null}'), [NOW_CALL]),
    "no white space": ('<tool_call>{"name":"now","arguments":{ }}</tool_call>x', [("now", "{ }"), "x"]),
    "escaped name": (called('{"n\\u0061me": "n\\u006fw", "arguments": {}}'), [NOW_CALL]),
    "arguments in a string": (
        called('{"name": "get_weather", "arguments": "{\\"city\\": \\"a\\\\n\\\\\\"\\ud83d\\ude42\\u00e5\\"}"}'),
        [("get_weather", '{"city": "a\\n\\"🙂å"}')],
    ),
    "half characters in a string": (
        called('{"name": "now", "arguments": "{\\"\\ud83d\\": \\"\\ud83d\\ud83d\\ude42\\ude42\\ud83d\\n\\""}'),
        [("now", '{"\ufffd": "\ufffd🙂\ufffd\ufffd\n"')],
    ),
    "empty string of arguments": (called('{"name": "now", "arguments": ""}'), [NOW_CALL]),
    "marks in strings": (
        called('{"name": "get_weather", "arguments": {"city": "</tool_call><tool_call>{\\"name\\""}}'),
        [("get_weather", '{"city": "</tool_call><tool_call>{\\"name\\""}')],
    ),
    "a call in text that begins like one": (f"<tool_call <tool<tool_{NOW}", ["<tool_call <tool<tool_", NOW_CALL]),
    "truncated before the arguments": (
        'Hm. <tool_call>\n{"name": "get_weather", "argum',
        ['Hm. <tool_call>\n{"name": "get_weather", "argum'],
    ),
    "truncated in the arguments": (OSLO[:-17], [("get_weather", '{"city": "Osl')]),
    "truncated after the arguments": (OSLO[:-14], [OSLO_CALL]),
    "truncated in the mark": (OSLO[:-3], [OSLO_CALL]),
    "truncated in a second call": (f"{OSLO}\n{NOW[:25]}", [OSLO_CALL, f"\n{NOW[:25]}"]),
    "truncated in a string of arguments": (
        '<tool_call>{"name": "now", "arguments": "{\\"a\\": \\"\\u00',
        [("now", '{"a": "')],
    ),
    "no closing brace": (f"{OSLO.replace('}}', '}')} x", [OSLO_CALL, " x"]),
    "no end": (OSLO.removesuffix("\n</tool_call>") + " x", [OSLO_CALL, " x"]),
    "no end before the next": (f"{OSLO.removesuffix('</tool_call>')}{NOW}", [OSLO_CALL, NOW_CALL]),
    "other text after the arguments": (
        '<tool_call>\n{"name": "now", "arguments": {}, id: 1}\n</tool_call>',
        [NOW_CALL, ", id: 1}\n</tool_call>"],
    ),
    "broken JSON, then a call": (called("{'name': 'now'}") + NOW, [called("{'name': 'now'}"), NOW_CALL]),
    "a mark, then a call": (f"<tool_call>\n{NOW}", ["<tool_call>\n", NOW_CALL]),
    **{
        f"no call: {text}": (called(text), [called(text)])
        for text in (
            "",
            "{}",
            "[]",
            "now",
            '{"arguments": {}}',
            '{"name": 1, "arguments": {}}',
            '{"name": "now" "arguments": {}}',
            '{"name": "now", "arguments": []}',
            '{"name": "now", "arguments": "[]"}',
            '{"name": "now", "arguments": nil}',
            '{"name": "unknown", "arguments": {"a": 1}}',
            '{"arguments": {"a": 1}, "name": "unknown"}',
            '{"name": "now", "name": "now", "arguments": {}}',
            '{"arguments": {}, "parameters": {}, "name": "now"}',
            '{"arguments": "{\\x}", "name": "now"}',
            '{"name": "n\now"}',
            '{"name": "now", }',
        )
    },
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_answers(answer: str, encode: Callable[[str], list[str]]) -> None:
    check_parser(HermesFormat(), *ANSWERS[answer], encode)


def test_arguments_are_passed_on_as_they_come() -> None:
    parser = HermesFormat().parser([Function(name, schema) for name, schema in OFFERED.items()])
    seen = [len(parse_arguments(parser.feed(char))) for char in OSLO]
    arguments = OSLO.index('{"city')
    assert seen == [0] * arguments + [1] * len('{"city": "Oslo"}') + [0] * (len(OSLO) - arguments - 16)


def parse_arguments(parts: Sequence[Part]) -> str:
    return "".join(part.arguments for part in parts if isinstance(part, CallPart))


def test_text_is_passed_on_as_it_comes() -> None:
    parser = HermesFormat().parser([])
    assert [parser.feed(char) for char in "a <tool b"] == [["a"], [" "], [], [], [], [], [], ["<tool "], ["b"]]


@whole_test_only_in_all
def test_long_answers_take_time_in_proportion() -> None:
    long = OSLO.replace("Oslo", "Oslo\\n{[<tool_call>" * 50_000)
    (call,) = parse(HermesFormat().parser([Function("get_weather", {})]), [long])
    assert len(call.arguments) == len(long) - len(OSLO) + 16  # type: ignore[union-attr]
    spaces = " <tool_call>" * 50_000
    assert parse(HermesFormat().parser([]), [spaces]) == [spaces]


def test_what_templates_get() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "now", "arguments": '{"a": [1]}'}}
    broken = {"id": "call_2", "type": "function", "function": {"name": "now", "arguments": "{"}}
    empty = {"id": "call_3", "type": "function", "function": {"name": "now", "arguments": ""}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": None, "tool_calls": [call, broken, empty]},
        {"role": "tool", "tool_call_id": "call_1", "content": "12"},
        {"role": "assistant", "content": "y", "tool_calls": []},
    ]
    prepared, tools = HermesFormat().prepare(messages, [Function("now", {}), Function("f", {"type": "object"}, "does")])
    assert prepared[0] == messages[0]
    assert prepared[1]["content"] == ""
    assert [each["function"]["arguments"] for each in prepared[1]["tool_calls"]] == [{"a": [1]}, "{", {}]
    assert prepared[2:] == [{**messages[2], "name": "now"}, {"role": "assistant", "content": "y"}]
    assert call["function"]["arguments"] == '{"a": [1]}'  # type: ignore[index]
    no_parameters = {"type": "object", "properties": {}}
    assert tools == [
        {"type": "function", "function": {"name": "now", "description": "", "parameters": no_parameters}},
        {"type": "function", "function": {"name": "f", "description": "does", "parameters": {"type": "object"}}},
    ]
    assert HermesFormat().prepare([], []) == ([], None)


def test_ids() -> None:
    ids = {HermesFormat().new_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(id.startswith("call_") for id in ids)
