"""Calls of functions by the default model, which is no tool user: a grammar guarantees them, with speculation."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import openai
import pytest

from tests.support.profiles import only_in_all

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "unit": {"enum": ["C", "F"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
SUM = {
    "type": "object",
    "properties": {
        "a": {"type": "integer", "maximum": 99},
        "b": {"type": "array", "items": {"enum": [1, 2]}, "maxItems": 2},
    },
    "required": ["a", "b"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "get_weather", "description": "Weather of a city.", "parameters": CITY}},
    {"type": "function", "function": {"name": "add", "parameters": SUM, "strict": True}},
]
NAMED = {"type": "function", "function": {"name": "add"}}


@pytest.mark.parametrize(("choice", "temperature"), [("required", 1), only_in_all(NAMED, 0)])
def test_calls_are_guaranteed(client: openai.OpenAI, choice: Any, temperature: float) -> None:
    def ask(speculation: bool) -> Any:
        answer = client.chat.completions.create(
            model="default",
            messages=[{"role": "user", "content": "What is the weather in Paris?"}],
            tools=TOOLS,
            tool_choice=choice,
            parallel_tool_calls=False,
            temperature=temperature,
            seed=3,
            max_completion_tokens=120,
            extra_body={"speculation": {"enabled": speculation}},
        )
        (found,) = answer.choices
        assert found.finish_reason == "tool_calls"
        assert found.message.content is None
        (call,) = found.message.tool_calls or []
        return call.function.name, call.function.arguments  # type: ignore[union-attr]

    name, arguments = ask(speculation=True)
    assert (name, arguments) == ask(speculation=False)
    assert choice == "required" or name == "add"
    jsonschema.validate(json.loads(arguments), {"get_weather": CITY, "add": SUM}[name])


def test_streamed_calls_join_to_the_whole(client: openai.OpenAI) -> None:
    asked: Any = {
        "model": "default",
        "messages": [{"role": "user", "content": "Add numbers."}],
        "tools": TOOLS,
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "temperature": 1,
        "seed": 5,
        "max_completion_tokens": 120,
    }
    (whole,) = client.chat.completions.create(**asked).choices
    with client.chat.completions.stream(**asked) as stream:
        pieces = [event for event in stream if event.type == "tool_calls.function.arguments.delta"]
        (final,) = stream.get_final_completion().choices
    (call,), (joined,) = whole.message.tool_calls or [], final.message.tool_calls or []
    assert joined.function.model_dump(include={"name", "arguments"}) == call.function.model_dump()
    assert "".join(piece.arguments_delta for piece in pieces) == call.function.arguments
    assert len(pieces) > 1


def test_results_go_back_to_the_model(client: openai.OpenAI) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
    messages: list[Any] = [
        {"role": "user", "content": "What is the weather in Paris?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "Sunny, 21 degrees."},
    ]
    answer = client.chat.completions.create(
        model="default", messages=messages, tools=TOOLS, temperature=0, max_completion_tokens=40
    )
    assert answer.choices[0].message.content
