"""Calls after [TOOL_CALLS]."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from server.text.tool_formats.mistral import MistralFormat
from tests.support.tool_walks import Call, check_parser

OSLO, NOW = '{"name": "get_weather", "arguments": {"city": "Oslo"}}', '{"name": "now", "arguments": {}}'
OSLO_CALL, NOW_CALL = ("get_weather", '{"city": "Oslo"}'), ("now", "{}")

ANSWERS: dict[str, tuple[str, list[str | Call]]] = {
    "nothing": ("", []),
    "text": ("Hello [you] [TOOL] [TOOL_CALL", ["Hello [you] [TOOL] [TOOL_CALL"]),
    "one call": (f"[TOOL_CALLS] [{OSLO}]", [OSLO_CALL]),
    "no white space": (f"[TOOL_CALLS][{OSLO}]", [OSLO_CALL]),
    "several": (f"[TOOL_CALLS] [{OSLO}, {NOW},\n{OSLO}]\n", [OSLO_CALL, NOW_CALL, OSLO_CALL]),
    "text before and after": (f"Let me see.[TOOL_CALLS] [{NOW}] Done.", ["Let me see.", NOW_CALL, " Done."]),
    "ids": (f'[TOOL_CALLS] [{OSLO[:-1]}, "id": "aB3dE6gH9"}}]', [OSLO_CALL]),
    "one object": (f"[TOOL_CALLS]{OSLO}", [OSLO_CALL]),
    "two arrays": (f"[TOOL_CALLS][{OSLO}][TOOL_CALLS][{NOW}]", [OSLO_CALL, NOW_CALL]),
    "a name and arguments": ('[TOOL_CALLS]get_weather{"city": "Oslo"}', [OSLO_CALL]),
    "names and arguments": (
        '[TOOL_CALLS]get_weather[ARGS]{"city": "Oslo"}[TOOL_CALLS]now[ARGS]{}',
        [OSLO_CALL, NOW_CALL],
    ),
    "a name, an id and arguments": ("[TOOL_CALLS]now[CALL_ID]aB3dE6gH9[ARGS]{}", [NOW_CALL]),
    "text between": (
        'a [TOOL_CALLS]now[ARGS]{} b [TOOL_CALLS]a.b-c_1 {"x": []}c',
        [
            "a ",
            NOW_CALL,
            " b ",
            ("a.b-c_1", '{"x": []}'),
            "c",
        ],
    ),
    "unicode and escapes": (
        '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Ørsta \\u00e5 \\"🙂]"}}]',
        [("get_weather", '{"city": "Ørsta \\u00e5 \\"🙂]"}')],
    ),
    "nested objects": (
        '[TOOL_CALLS]a.b-c_1[ARGS]{"x": [{"y": {"z": "}]"}}, []]}',
        [("a.b-c_1", '{"x": [{"y": {"z": "}]"}}, []]}')],
    ),
    "name after arguments": ('[TOOL_CALLS][{"arguments": {"city": "Oslo"}, "name": "get_weather"}]', [OSLO_CALL]),
    "a string of arguments": ('[TOOL_CALLS][{"name": "now", "arguments": "{}"}]', [NOW_CALL]),
    "marks in strings": (
        '[TOOL_CALLS]get_weather[ARGS]{"city": "[TOOL_CALLS]now[ARGS]{}"}',
        [("get_weather", '{"city": "[TOOL_CALLS]now[ARGS]{}"}')],
    ),
    "truncated in the arguments": (f"[TOOL_CALLS] [{OSLO[:-4]}", [("get_weather", '{"city": "Osl')]),
    "truncated after a comma": (f"[TOOL_CALLS] [{OSLO}, ", [OSLO_CALL]),
    "truncated in a second call": (f"[TOOL_CALLS][{OSLO},{NOW[:12]}", [OSLO_CALL, NOW[:12]]),
    "truncated in a name": ("[TOOL_CALLS]get_we", ["[TOOL_CALLS]get_we"]),
    "truncated in a mark": ("[TOOL_CALLS]now[AR", ["[TOOL_CALLS]now[AR"]),
    "an empty array": ("[TOOL_CALLS] []", ["[TOOL_CALLS] []"]),
    "an unknown name": ('[TOOL_CALLS]then[ARGS]{"a": 1}', ['[TOOL_CALLS]then[ARGS]{"a": 1}']),
    "a name in text": ("[TOOL_CALLS]now and then", ["[TOOL_CALLS]now and then"]),
    "broken JSON": ("[TOOL_CALLS] [{name: 1}]", ["[TOOL_CALLS] [{name: 1}]"]),
    "broken array": (f"[TOOL_CALLS] [{OSLO} {NOW}]", [OSLO_CALL, f" {NOW}]"]),
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_answers(answer: str, encode: Callable[[str], list[str]]) -> None:
    check_parser(MistralFormat(), *ANSWERS[answer], encode)


def test_ids_are_nine_letters_and_digits() -> None:
    ids = [MistralFormat().new_id() for _ in range(100)]
    assert len(set(ids)) == 100
    assert all(re.fullmatch("[a-zA-Z0-9]{9}", id) for id in ids)


def test_ids_of_clients_are_made_to_fit() -> None:
    def call(id: str) -> dict[str, Any]:
        return {"id": id, "type": "function", "function": {"name": "now", "arguments": "{}"}}

    ids = ["aB3dE6gH9", "call_1", "call_2"]
    messages: list[dict[str, Any]] = [
        {"role": "assistant", "content": None, "tool_calls": [call(id) for id in ids]},
        *({"role": "tool", "tool_call_id": id, "content": "x"} for id in ids),
    ]
    (assistant, *results), _ = MistralFormat().prepare(messages, [])
    sent = [each["id"] for each in assistant["tool_calls"]]
    assert sent == [result["tool_call_id"] for result in results]
    assert sent[0] == ids[0]
    assert len(set(sent)) == 3
    assert all(re.fullmatch("[a-zA-Z0-9]{9}", id) for id in sent)
    assert messages[0]["tool_calls"][1]["id"] == "call_1"
