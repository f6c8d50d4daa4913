"""openai: responses.create, stream and parse, with tools and kept conversations."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from tests.support.client_servers import WEATHER_CALL, City, ScriptedServer
from tests.support.servers import PATIENCE_S, Server

QUESTION = "What is the weather in Ulm?"
WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "Look up the weather.",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


@pytest.mark.parametrize("keeps", [True, False])
def test_tools(client: openai.OpenAI, scripted: ScriptedServer, keeps: bool) -> None:
    """create(tools=…): thinking and a call, then the answer, by previous_response_id or by items sent back."""
    scripted.answer(f"<think>\nI look it up.\n</think>\n\n{WEATHER_CALL}", "It has 17 degrees.")
    ask: Any = {"model": scripted.model, "tools": [WEATHER], "store": keeps}
    first = client.responses.create(**ask, input=QUESTION)
    (call,) = [item for item in first.output if item.type == "function_call"]
    assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": "Ulm"})
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "17 degrees"}
    if keeps:
        second = client.responses.create(**ask, input=[result], previous_response_id=first.id)
        assert client.responses.retrieve(second.id).output_text == "It has 17 degrees."
        client.responses.delete(second.id)
    else:
        items: Any = [{"role": "user", "content": QUESTION}, *first.output, result]
        second = client.responses.create(**ask, input=items)
    assert second.output_text == "It has 17 degrees."
    for part in ("I look it up.", '"city": "Ulm"', "17 degrees"):
        assert part in scripted.prompts()[1]


def test_stream(client: openai.OpenAI, scripted: ScriptedServer) -> None:
    """The helper responses.stream: events of text and of arguments, and the response at the end."""
    scripted.answer(f"<think>\nI look it up.\n</think>\n\nLooking. {WEATHER_CALL}")
    with client.responses.stream(model=scripted.model, input=QUESTION, tools=[WEATHER]) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_response()
    assert {
        "response.created",
        "response.reasoning_text.delta",
        "response.output_text.delta",
        "response.function_call_arguments.delta",
        "response.completed",
    } <= kinds
    assert final.output_text.strip() == "Looking."
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call"]
    assert final.usage is not None
    assert final.usage.output_tokens_details.reasoning_tokens > 0


@pytest.mark.parametrize("streams", [False, True])
def test_parsed(server: Server, streams: bool) -> None:
    """parse(text_format=a pydantic model) and stream(text_format=…) by the default model."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=PATIENCE_S, max_retries=0)
    options: Any = {"model": "default", "input": "Tell me of Paris.", "text_format": City, "temperature": 0}
    if streams:
        with client.responses.stream(**options) as stream:
            answer: Any = stream.get_final_response()
    else:
        answer = client.responses.parse(**options)
    assert isinstance(answer.output_parsed, City)
