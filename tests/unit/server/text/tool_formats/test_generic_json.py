"""Functions in models whose template knows no tools."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from server.text.tool_formats.generic_json import GenericJsonFormat
from server.text.tool_formats.hermes import HermesFormat
from server.text.tools.functions import Function
from tests.support.tool_walks import Call, check_parser

FUNCTIONS = [Function("now", {}, "Tells the time."), Function("f", {"type": "object"})]
USER = {"role": "user", "content": "What time is it?"}
NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'


def lines(message: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the functions that a message describes."""
    listed = message["content"].split("<tools>\n")[1].split("\n</tools>")[0]
    return [json.loads(line) for line in listed.split("\n")]


def test_functions_are_described_in_the_system_message() -> None:
    (system, user), tools = GenericJsonFormat().prepare([USER], FUNCTIONS)
    assert tools is None
    assert (system["role"], user) == ("system", USER)
    assert [each["name"] for each in lines(system)] == ["now", "f"]
    assert lines(system)[0]["description"] == "Tells the time."
    for content, begin in (("Be brief.", "Be brief.\n\n"), ("", ""), (None, "")):
        (merged, _), _ = GenericJsonFormat().prepare([{"role": "system", "content": content}, USER], FUNCTIONS)
        assert merged == {"role": "system", "content": begin + system["content"]}


def test_conversations_without_functions_stay_as_they_are() -> None:
    messages = [{"role": "system", "content": "x"}, {**USER, "name": "Ann"}, {"role": "assistant", "content": "y"}]
    assert GenericJsonFormat().prepare(messages, []) == (messages, None)


def test_calls_and_results_become_text() -> None:
    def call(id: str, arguments: str) -> dict[str, Any]:
        return {"id": id, "type": "function", "function": {"name": "f", "arguments": arguments}}

    messages: list[dict[str, Any]] = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call("a", '{"x": "å"}')]},
        {"role": "tool", "tool_call_id": "a", "content": "1"},
        {"role": "assistant", "content": "Hm.", "tool_calls": [call("b", "{}"), call("c", "{")]},
        {"role": "tool", "tool_call_id": "b", "content": "2"},
        {"role": "tool", "tool_call_id": "c", "content": "3"},
        {"role": "assistant", "content": "It is 3."},
    ]
    prepared, _ = GenericJsonFormat().prepare(messages, [])
    first, second, third = (
        f'<tool_call>\n{{"name": "f", "arguments": {arguments}}}\n</tool_call>'
        for arguments in ('{"x": "å"}', "{}", '"{"')
    )
    assert prepared == [
        USER,
        {"role": "assistant", "content": first},
        {"role": "user", "content": "<tool_response>\n1\n</tool_response>"},
        {"role": "assistant", "content": f"Hm.\n{second}\n{third}"},
        {
            "role": "user",
            "content": "<tool_response>\n2\n</tool_response>\n<tool_response>\n3\n</tool_response>",
        },
        messages[-1],
    ]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("It is late.", ["It is late."]),
        (NOW, [("now", "{}")]),
        (f"Let me see. {NOW}\n{NOW}", ["Let me see. ", ("now", "{}"), ("now", "{}")]),
    ],
)
def test_answers(answer: str, expected: list[str | Call], encode: Callable[[str], list[str]]) -> None:
    check_parser(GenericJsonFormat(), answer, expected, encode)
    assert type(GenericJsonFormat().parser([])) is type(HermesFormat().parser([]))
