"""The Responses API of the default model through OpenAI's own client."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from openai.types.responses import FunctionToolParam, ResponseFunctionToolCall
from pydantic import BaseModel

MODEL = "default"
WEATHER: FunctionToolParam = {
    "type": "function",
    "name": "get_weather",
    "description": "Get the weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}


class Person(BaseModel):
    name: str
    age: int


def test_text(client: openai.OpenAI) -> None:
    response = client.responses.create(
        model=MODEL,
        instructions="Answer with one word.",
        input="What is the capital of France?",
        temperature=0,
        max_output_tokens=20,
        metadata={"topic": "geography"},
    )
    assert "Paris" in response.output_text
    assert response.metadata == {"topic": "geography"}
    assert response.usage is not None
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    assert response.usage.output_tokens_details.reasoning_tokens == 0


def test_streams_tell_the_same(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "input": "Count to five.", "seed": 3, "max_output_tokens": 24}
    extra = {"seed": asked.pop("seed")}
    whole = client.responses.create(**asked, extra_body=extra)
    events = list(client.responses.create(**asked, extra_body=extra, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert events[-1].type == f"response.{whole.status}"
    with client.responses.stream(
        model=MODEL, input="Say hello.", temperature=0, extra_body={"stop": ["!"]}, max_output_tokens=60
    ) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert "".join(deltas) == final.output_text


def test_parsed_answers(client: openai.OpenAI) -> None:
    response = client.responses.parse(
        model=MODEL, input="Ada is 36 years old. Who is she?", text_format=Person, temperature=0, max_output_tokens=100
    )
    assert isinstance(response.output_parsed, Person)
    with client.responses.stream(
        model=MODEL, input="Bob is 7.", text_format=Person, temperature=0, max_output_tokens=100
    ) as stream:
        stream.until_done()
        assert isinstance(stream.get_final_response().output_parsed, Person)


def call_of(response: Any) -> ResponseFunctionToolCall:
    (call,) = [item for item in response.output if item.type == "function_call"]
    assert isinstance(call, ResponseFunctionToolCall)
    assert json.loads(call.arguments).keys() == {"city"}
    assert call.name == "get_weather"
    return call


def test_functions(client: openai.OpenAI) -> None:
    """The loop of a client that runs functions: with what the server keeps, and with the whole input."""
    question: Any = {"role": "user", "content": "How is the weather in Paris?"}
    response = client.responses.create(
        model=MODEL,
        input=[question],
        tools=[WEATHER],
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=0,
        max_output_tokens=100,
    )
    call = call_of(response)
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny, 24 degrees."}
    asked: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_output_tokens": 40, "tools": [WEATHER]}
    asked["tool_choice"] = "none"
    items: Any = [question, *response.output, output]
    kept = client.responses.create(**asked, input=[output], previous_response_id=response.id)
    replayed = client.responses.create(**asked, input=items, store=False)
    assert kept.output_text == replayed.output_text != ""
    assert kept.usage is not None
    assert replayed.usage is not None
    assert kept.usage.input_tokens == replayed.usage.input_tokens
    with client.responses.stream(
        model=MODEL,
        input=[question],
        tools=[WEATHER],
        tool_choice={"type": "function", "name": "get_weather"},
        parallel_tool_calls=False,
        temperature=0,
        max_output_tokens=100,
    ) as stream:
        parts = [event.delta for event in stream if event.type == "response.function_call_arguments.delta"]
        assert "".join(parts) == call_of(stream.get_final_response()).arguments


def test_kept_responses(client: openai.OpenAI) -> None:
    response = client.responses.create(model=MODEL, input="My name is Ada.", temperature=0, max_output_tokens=8)
    assert client.responses.retrieve(response.id).output == response.output
    (item,) = client.responses.input_items.list(response.id)
    assert item.type == "message"
    question: Any = {"role": "user", "content": "What is my name?"}
    asked: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_output_tokens": 12}
    follow = client.responses.create(**asked, input=[question], previous_response_id=response.id)
    first: Any = {"role": "user", "content": "My name is Ada."}
    items: Any = [first, *response.output, question]
    whole = client.responses.create(**asked, input=items)
    assert follow.output_text == whole.output_text
    client.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)
    with pytest.raises(openai.BadRequestError) as gone:
        client.responses.create(model=MODEL, input="And?", previous_response_id=response.id)
    assert gone.value.code == "previous_response_not_found"
