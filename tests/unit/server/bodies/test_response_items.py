"""Items of the Responses API become the messages of a chat."""

from __future__ import annotations

from typing import Any

import pytest

from server.bodies.chat_body import Message
from server.bodies.response_items import listed, parse_items, to_messages
from server.errors import ApiError
from server.limits import MAX_CALLS

USER = {"role": "user", "content": "hi"}
THINKING = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}
TEXT = {
    "type": "message",
    "id": "msg_1",
    "role": "assistant",
    "status": "completed",
    "phase": None,
    "content": [{"type": "output_text", "text": "Let me see.", "annotations": [], "logprobs": []}],
}
CALL = {
    "type": "function_call",
    "id": "fc_1",
    "call_id": "call_1",
    "name": "f",
    "arguments": "{}",
    "status": "completed",
}
OUTPUT = {"type": "function_call_output", "call_id": "call_1", "output": "7"}


def messages(*items: dict[str, Any]) -> list[dict[str, Any]]:
    return [message.model_dump(exclude_none=True) for message in to_messages(parse_items(items))]


def call(id: str) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": "f", "arguments": "{}"}}


def test_an_answer_is_one_message() -> None:
    assert messages(USER, THINKING, TEXT, CALL, CALL | {"call_id": "call_2"}, OUTPUT) == [
        USER,
        {
            "role": "assistant",
            "content": "Let me see.",
            "reasoning_content": "hm",
            "tool_calls": [call("call_1"), call("call_2")],
        },
        {"role": "tool", "content": "7", "tool_call_id": "call_1"},
    ]


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ([{"type": None, **USER}], [USER]),
        ([CALL], [{"role": "assistant", "tool_calls": [call("call_1")]}]),
        ([THINKING], [{"role": "assistant", "content": "", "reasoning_content": "hm"}]),
        ([{**THINKING, "content": [], "summary": []}], []),
        (
            [{**THINKING, "content": None, "summary": [{"type": "summary_text", "text": "short"}]}],
            [{"role": "assistant", "content": "", "reasoning_content": "short"}],
        ),
        # A new answer begins with text after text or calls, and with thinking after anything.
        ([TEXT, TEXT], [{"role": "assistant", "content": "Let me see."}] * 2),
        (
            [CALL, THINKING, TEXT],
            [
                {"role": "assistant", "tool_calls": [call("call_1")]},
                {"role": "assistant", "content": "Let me see.", "reasoning_content": "hm"},
            ],
        ),
        (
            [
                {
                    "type": "message",
                    "role": "developer",
                    "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}],
                }
            ],
            [{"role": "developer", "content": "a\nb"}],
        ),
        (
            [{**OUTPUT, "output": [{"type": "input_text", "text": "7", "prompt_cache_breakpoint": {}}]}],
            [{"role": "tool", "content": "7", "tool_call_id": "call_1"}],
        ),
    ],
)
def test_items_become_messages(items: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert messages(*items) == expected


@pytest.mark.parametrize(
    ("item", "param", "code"),
    [
        ("x", "input.1", "invalid_value"),
        ({}, "input.1.type", "not_served"),
        ({"type": "item_reference", "id": "msg_1"}, "input.1.type", "not_served"),
        ({"type": ["message"]}, "input.1.type", "not_served"),
        ({"role": "user"}, "input.1.content", "missing_field"),
        ({"role": "tool", "content": "x"}, "input.1.role", "invalid_value"),
        ({**USER, "content": None}, "input.1.content", "invalid_value"),
        ({**USER, "content": [{"type": "input_image", "image_url": "x"}]}, "input.1.content", "not_served"),
        ({**USER, "content": [{"type": "input_text", "text": 5}]}, "input.1.content", "invalid_value"),
        ({**USER, "content": [{"type": "input_text", "text": "x", "more": 1}]}, "input.1.content", "invalid_value"),
        ({**USER, "more": 1}, "input.1.more", "unknown_field"),
        ({**CALL, "arguments": {}}, "input.1.arguments", "invalid_value"),
        ({**CALL, "name": "a b"}, "input.1.name", "invalid_value"),
        ({**CALL, "namespace": "n"}, "input.1.namespace", "not_served"),
        ({**OUTPUT, "output": [{"type": "input_file"}]}, "input.1.output", "not_served"),
        ({**THINKING, "encrypted_content": "x"}, "input.1.encrypted_content", "not_served"),
    ],
)
def test_what_is_not_served_is_named(item: Any, param: str, code: str) -> None:
    with pytest.raises(ApiError) as refused:
        parse_items([USER, item])
    assert (refused.value.param, refused.value.code) == (param, code)
    assert refused.value.message.startswith(f"{param}: ")


def test_an_answer_has_a_bounded_number_of_calls() -> None:
    assert len(to_messages(parse_items([CALL] * MAX_CALLS))) == 1
    with pytest.raises(ApiError, match="calls"):
        to_messages(parse_items([CALL] * (MAX_CALLS + 1)))


def test_listed_items_have_a_type_an_id_and_parts() -> None:
    given: list[dict[str, Any]] = [
        USER,
        {"role": "assistant", "content": "ho"},
        OUTPUT,
        {**THINKING, "content": "hm"},
        TEXT,
    ]
    shown = [listed(item, lambda kind: f"new {kind}") for item in given]
    assert shown == [
        {
            "type": "message",
            "id": "new message",
            "role": "user",
            "content": [{"type": "input_text", "text": "hi"}],
        },
        {
            "type": "message",
            "id": "new message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "ho"}],
        },
        {**OUTPUT, "id": "new function_call_output"},
        THINKING,
        TEXT,
    ]
    assert to_messages(parse_items(shown)) == to_messages(parse_items(given))
    assert isinstance(to_messages(parse_items(shown))[0], Message)
