"""openai: chat.completions with tools and structured output, sync, async and streamed."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest

from tests.support.client_servers import WEATHER_CALL, City, ScriptedServer
from tests.support.servers import PATIENCE_S, Server

QUESTION: Any = {"role": "user", "content": "What is the weather in Ulm?"}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Look up the weather.",
        "strict": True,  # version 2 streams no others
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture
def default(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=PATIENCE_S, max_retries=0)


def result(call: Any) -> Any:
    return {"role": "tool", "tool_call_id": call.id, "content": '{"degrees": 17}'}


def test_tools(client: openai.OpenAI, scripted: ScriptedServer) -> None:
    """create(tools=…): a call with thinking before it, then the answer from its result and the message sent back."""
    scripted.answer(f"<think>\nI look it up.\n</think>\n\nLooking. {WEATHER_CALL}", "It has 17 degrees.")
    first = client.chat.completions.create(model=scripted.model, messages=[QUESTION], tools=[WEATHER])
    (choice,) = first.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Looking."
    assert choice.message.tool_calls
    (call,) = choice.message.tool_calls
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Ulm"})
    messages = [QUESTION, choice.message, result(call)]
    second = client.chat.completions.create(model=scripted.model, messages=messages, tools=[WEATHER])
    assert second.choices[0].message.content == "It has 17 degrees."
    prompts = scripted.prompts()
    assert "Look up the weather." in prompts[0]
    assert "I look it up." in prompts[1]
    assert '{"degrees": 17}' in prompts[1]


def test_tools_async(scripted: ScriptedServer) -> None:
    """AsyncOpenAI: two calls in one answer, streamed and whole."""

    async def ask() -> tuple[Any, Any]:
        async with openai.AsyncOpenAI(base_url=scripted.url, api_key="none", max_retries=0) as client:
            options: Any = {"model": scripted.model, "messages": [QUESTION], "tools": [WEATHER]}
            whole = await client.chat.completions.create(**options)
            async with client.chat.completions.stream(**options) as stream:
                return whole, await stream.get_final_completion()

    scripted.answer(*[f"{WEATHER_CALL}\n{WEATHER_CALL}"] * 2)
    for answer in asyncio.run(ask()):
        calls = answer.choices[0].message.tool_calls
        assert [json.loads(call.function.arguments) for call in calls] == [{"city": "Ulm"}] * 2
        assert len({call.id for call in calls}) == 2


def test_stream_of_tools(client: openai.OpenAI, scripted: ScriptedServer) -> None:
    """The helper chat.completions.stream: events of content and of arguments, and the completion at the end."""
    scripted.answer(f"Looking. {WEATHER_CALL}")
    with client.chat.completions.stream(
        model=scripted.model, messages=[QUESTION], tools=[WEATHER], stream_options={"include_usage": True}
    ) as stream:
        events: list[Any] = list(stream)
        final = stream.get_final_completion()
    kinds = {event.type for event in events}
    assert {"content.delta", "tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
    (done,) = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    assert (done.name, json.loads(done.arguments)) == ("get_weather", {"city": "Ulm"})
    assert final.choices[0].finish_reason == "tool_calls"
    assert final.usage is not None
    assert final.usage.completion_tokens > 0


@pytest.mark.parametrize("streams", [False, True])
def test_parsed_response_format(default: openai.OpenAI, streams: bool) -> None:
    """parse(response_format=a pydantic model), whole and streamed, by the default model."""
    options: Any = {
        "model": "default",
        "messages": [{"role": "user", "content": "Tell me of Paris."}],
        "temperature": 0,
        "response_format": City,
    }
    if streams:
        with default.chat.completions.stream(**options) as stream:
            answer = stream.get_final_completion()
    else:
        answer = default.chat.completions.parse(**options)
    assert isinstance(answer.choices[0].message.parsed, City)


def test_parsed_function(default: openai.OpenAI) -> None:
    """parse(tools=[pydantic_function_tool(…)], tool_choice="required") by the default model."""
    answer = default.chat.completions.parse(
        model="default",
        messages=[{"role": "user", "content": "Tell me of Paris."}],
        tools=[openai.pydantic_function_tool(City)],
        tool_choice="required",
        parallel_tool_calls=False,  # greedy, a small model may repeat its call without end
        temperature=0,
    )
    assert answer.choices[0].message.tool_calls
    (call,) = answer.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, City)
    assert answer.choices[0].finish_reason == "tool_calls"


def test_named_function(default: openai.OpenAI) -> None:
    """tool_choice={"type": "function", …}, streamed, with parallel_tool_calls=False, by the default model."""
    with default.chat.completions.stream(
        model="default",
        messages=[{"role": "user", "content": "Tell me of Lima."}],
        tools=[WEATHER, openai.pydantic_function_tool(City, name="tell")],
        tool_choice={"type": "function", "function": {"name": "tell"}},
        parallel_tool_calls=False,
        temperature=0,
    ) as stream:
        answer = stream.get_final_completion()
    assert answer.choices[0].message.tool_calls
    (call,) = answer.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, City)
