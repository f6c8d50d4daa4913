"""LiteLLM: openai/… chats, with tools and structured output, and anthropic/… messages, streamed and not; errors; the
Messages API over responses."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import litellm
import pytest
from litellm.exceptions import BadRequestError, NotFoundError

from tests.support.client_servers import WEATHER_CALL, City, ScriptedServer
from tests.support.servers import PATIENCE_S, Server

QUESTION = {"role": "user", "content": "What is the weather in Ulm?"}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Look up the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def options(url: str, model: str) -> dict[str, Any]:
    return {
        "model": f"openai/{model}",
        "api_base": url,
        "api_key": "none",
        "tools": [WEATHER],
        "timeout": PATIENCE_S,
        "num_retries": 0,
    }


def ask(server: Server, question: str = "What is the capital of France? Answer with one word.") -> dict[str, Any]:
    """Return the arguments of a question to the default model, without tools."""
    plain = options(f"{server.url}/v1", "default") | {"temperature": 0, "max_tokens": 40}
    del plain["tools"]
    return plain | {"messages": [{"role": "user", "content": question}]}


def test_completion(server: Server) -> None:
    """completion(…) by the default model."""
    answer = litellm.completion(**ask(server))
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens > 0


def test_stream_of_text(server: Server) -> None:
    """completion(stream=True) by the default model: the chunks are the text."""
    chunks = list(litellm.completion(**ask(server), stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == litellm.completion(**ask(server)).choices[0].message.content


def test_structured_output(server: Server) -> None:
    """completion(response_format=a pydantic model) by the default model."""
    answer = litellm.completion(**ask(server, "Tell me of Paris."), response_format=City)
    City.model_validate_json(answer.choices[0].message.content)


def test_errors(server: Server) -> None:
    """Status and message become LiteLLM's exceptions."""
    with pytest.raises(BadRequestError, match="top_p"):
        litellm.completion(**ask(server) | {"top_p": 7})
    with pytest.raises(NotFoundError):
        litellm.completion(**ask(server) | {"model": "openai/another"})


def test_tools(scripted: ScriptedServer) -> None:
    """completion(tools=…): thinking and a call, then the answer from its result and the message sent back."""
    scripted.answer(f"<think>\nI look it up.\n</think>\n\nLooking. {WEATHER_CALL}", "It has 17 degrees.")
    ask = options(scripted.url, scripted.model)
    (choice,) = litellm.completion(**ask, messages=[QUESTION]).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.reasoning_content.strip() == "I look it up."
    (call,) = choice.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Ulm"})
    result = {"role": "tool", "tool_call_id": call.id, "content": "17 degrees"}
    answer = litellm.completion(**ask, messages=[QUESTION, choice.message, result])
    assert answer.choices[0].message.content == "It has 17 degrees."
    assert "I look it up." in scripted.prompts()[1]


def test_stream(scripted: ScriptedServer) -> None:
    """completion(tools=…, stream=True), joined by stream_chunk_builder."""
    scripted.answer(f"Looking. {WEATHER_CALL}")
    chunks = list(litellm.completion(**options(scripted.url, scripted.model), messages=[QUESTION], stream=True))
    whole: Any = litellm.stream_chunk_builder(chunks)
    (call,) = whole.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Ulm"})
    assert whole.choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_forced_call(server: Server, choice: Any) -> None:
    """completion(tool_choice=…) by the default model."""
    ask = options(f"{server.url}/v1", "default") | {"temperature": 0, "parallel_tool_calls": False}
    message = litellm.completion(**ask, messages=[QUESTION], tool_choice=choice).choices[0].message
    assert {call.function.name for call in message.tool_calls} == {"get_weather"}


def test_anthropic(scripted: ScriptedServer) -> None:
    """completion(model="anthropic/…") over /v1/messages, whole and streamed."""
    ask = options(scripted.url, scripted.model) | {"model": f"anthropic/{scripted.model}", "api_base": scripted.root}
    scripted.answer(f"Looking. {WEATHER_CALL}", f"Looking. {WEATHER_CALL}")
    whole: Any = litellm.completion(**ask, messages=[QUESTION])
    streamed: Any = litellm.stream_chunk_builder(list(litellm.completion(**ask, messages=[QUESTION], stream=True)))
    for answer in (whole, streamed):
        (call,) = answer.choices[0].message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Ulm"})
        assert answer.choices[0].finish_reason == "tool_calls"


def test_bridge_from_anthropic(scripted: ScriptedServer) -> None:
    """anthropic_messages(model="openai/…"): LiteLLM serves the Messages API over /v1/responses."""
    scripted.answer(f"Looking. {WEATHER_CALL}")
    tool = {"name": "get_weather", "input_schema": WEATHER["function"]["parameters"]}
    answer: Any = asyncio.run(
        litellm.anthropic_messages(
            model=f"openai/{scripted.model}",
            api_base=scripted.url,
            api_key="none",
            max_tokens=500,
            messages=[QUESTION],
            tools=[tool],
        )
    )
    assert answer["content"][-1]["input"] == {"city": "Ulm"}
    assert answer["stop_reason"] == "tool_use"
