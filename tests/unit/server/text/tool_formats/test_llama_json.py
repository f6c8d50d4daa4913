"""Answers that are JSON with parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from server.text.tool_formats.llama_json import LlamaJsonFormat
from tests.support.tool_walks import Call, check_parser

OSLO, NOW = '{"name": "get_weather", "parameters": {"city": "Oslo"}}', '{"name": "now", "parameters": {}}'
OSLO_CALL, NOW_CALL = ("get_weather", '{"city": "Oslo"}'), ("now", "{}")

ANSWERS: dict[str, tuple[str, list[str | Call]]] = {
    "nothing": ("", []),
    "text": ("Hello {you}", ["Hello {you}"]),
    "one call": (OSLO, [OSLO_CALL]),
    "white space around": (f"\n {OSLO} \n", [OSLO_CALL]),
    "with the tag": (f"<|python_tag|>{OSLO}", [OSLO_CALL]),
    "separated by semicolons": (f"{OSLO}; {NOW};{OSLO}", [OSLO_CALL, NOW_CALL, OSLO_CALL]),
    "separated by lines": (f"{OSLO}\n{NOW}\n\n{OSLO}", [OSLO_CALL, NOW_CALL, OSLO_CALL]),
    "with the tag, separated": (f"<|python_tag|>{OSLO}; {NOW}", [OSLO_CALL, NOW_CALL]),
    "text before the tag": (f"Let me see.<|python_tag|>{OSLO}", ["Let me see.", OSLO_CALL]),
    "text after": (f"{OSLO}\nThat is it. {NOW}", [OSLO_CALL, f"\nThat is it. {NOW}"]),
    "text before": (f"I call {OSLO}", [f"I call {OSLO}"]),
    "text after a semicolon": (f"{OSLO}; no", [OSLO_CALL, "; no"]),
    "unicode and escapes": (
        '{"name": "get_weather", "parameters": {"city": "Ørsta \\u00e5\\n\\"; 🙂"}}',
        [("get_weather", '{"city": "Ørsta \\u00e5\\n\\"; 🙂"}')],
    ),
    "nested objects": (
        '{"name": "a.b-c_1", "parameters": {"x": [{"y": {"z": "};"}}, []]}}',
        [("a.b-c_1", '{"x": [{"y": {"z": "};"}}, []]}')],
    ),
    "type, and name after arguments": (
        '{"type": "function", "parameters": {"city": "Oslo"}, "name": "get_weather"}',
        [OSLO_CALL],
    ),
    "arguments": (OSLO.replace("parameters", "arguments"), [OSLO_CALL]),
    "no parameters": ('{"name": "now"}', [NOW_CALL]),
    "the tag in a string": (
        '{"name": "get_weather", "parameters": {"city": "<|python_tag|>{"}}',
        [("get_weather", '{"city": "<|python_tag|>{"}')],
    ),
    "truncated in the arguments": (OSLO[:-4], [("get_weather", '{"city": "Osl')]),
    "truncated before the arguments": (OSLO[:30], [OSLO[:30]]),
    "truncated in the tag": ("<|pyth", ["<|pyth"]),
    "a program after the tag": ("<|python_tag|>print({})", ["<|python_tag|>print({})"]),
    "JSON that is no call": ('{"city": "Oslo", "days": [1, {}]}', ['{"city": "Oslo", "days": [1, {}]}']),
    "JSON of a person": ('{"name": "Anna", "age": 3}', ['{"name": "Anna", "age": 3}']),
    "an unknown function": (NOW.replace("now", "then"), [NOW.replace("now", "then")]),
    "broken JSON": ('{"name": now, "parameters": {}}', ['{"name": now, "parameters": {}}']),
    "broken after the arguments": ('{"name": "now", "parameters": {} ]', [NOW_CALL, " ]"]),
    "a call, then JSON": (f'{OSLO}\n{{"a": 1}}', [OSLO_CALL, '\n{"a": 1}']),
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_answers(answer: str, encode: Callable[[str], list[str]]) -> None:
    check_parser(LlamaJsonFormat(), *ANSWERS[answer], encode)


def test_messages_of_several_calls_become_one_each() -> None:
    calls = [{"id": f"c{i}", "type": "function", "function": {"name": "f", "arguments": "{}"}} for i in range(3)]
    results = [{"role": "tool", "tool_call_id": f"c{i}", "content": f"{i}"} for i in (2, 0, 1)]
    user = {"role": "user", "content": "x"}
    messages: list[dict[str, Any]] = [user, {"role": "assistant", "content": "y", "tool_calls": calls}, *results, user]
    prepared, tools = LlamaJsonFormat().prepare(messages, [])
    assert tools is None
    shown = [(each["role"], each["content"], [call["id"] for call in each.get("tool_calls", ())]) for each in prepared]
    assert shown == [
        ("user", "x", []),
        ("assistant", "y", ["c0"]),
        ("tool", "0", []),
        ("assistant", "", ["c1"]),
        ("tool", "1", []),
        ("assistant", "", ["c2"]),
        ("tool", "2", []),
        ("user", "x", []),
    ]
