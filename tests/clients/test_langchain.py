"""langchain-openai: bind_tools, with_structured_output in all its methods, streams."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.messages import AIMessageChunk, HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

from tests.support.client_servers import WEATHER_CALL, City, ScriptedServer
from tests.support.servers import PATIENCE_S, Server

QUESTION = HumanMessage("What is the weather in Ulm?")


@tool
def get_weather(city: str) -> str:
    """Look up the weather."""
    return f"{city}: 17 degrees"


def chat(url: str, model: str) -> ChatOpenAI:
    return ChatOpenAI(
        model=model,
        base_url=url,
        api_key="none",  # type: ignore[arg-type]
        temperature=0,
        stream_usage=True,  # by default only of OpenAI's own server
        timeout=PATIENCE_S,
        max_retries=0,
    )


def test_bind_tools(scripted: ScriptedServer) -> None:
    """bind_tools(…).invoke: a call, then the answer from its ToolMessage."""
    scripted.answer(f"<think>\nI look it up.\n</think>\n\nLooking. {WEATHER_CALL}", "It has 17 degrees.")
    model = chat(scripted.url, scripted.model).bind_tools([get_weather])
    first = model.invoke([QUESTION])
    (call,) = first.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Ulm"})
    second = model.invoke([QUESTION, first, get_weather.invoke(call)])
    assert second.content == "It has 17 degrees."
    assert "Ulm: 17 degrees" in scripted.prompts()[1]


def test_stream_of_calls(scripted: ScriptedServer) -> None:
    """bind_tools(…).stream: chunks whose sum is the message with its call."""
    scripted.answer(f"Looking. {WEATHER_CALL}")
    model = chat(scripted.url, scripted.model).bind_tools([get_weather])
    chunks: list[Any] = list(model.stream([QUESTION]))
    assert len([chunk for chunk in chunks if chunk.tool_call_chunks]) > 1
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert isinstance(whole, AIMessageChunk)
    assert whole.text.strip() == "Looking."
    (call,) = whole.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Ulm"})
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] > 0


@pytest.mark.parametrize("choice", ["any", "get_weather"])
def test_forced_call(server: Server, choice: str) -> None:
    """bind_tools(…, tool_choice=…) by the default model."""
    model = chat(f"{server.url}/v1", "default").bind_tools(
        [get_weather], tool_choice=choice, strict=True, parallel_tool_calls=False
    )
    (call,) = model.invoke([QUESTION]).tool_calls
    assert call["name"] == "get_weather"
    assert isinstance(call["args"]["city"], str)


@pytest.mark.parametrize("method", ["function_calling", "json_schema"])
@pytest.mark.parametrize("strict", [None, True])
def test_structured_output(server: Server, method: Any, strict: bool | None) -> None:
    """with_structured_output(a pydantic model, method=…) by the default model."""
    model = chat(f"{server.url}/v1", "default").with_structured_output(City, method=method, strict=strict)
    assert isinstance(model.invoke("Tell me of Paris."), City)


def test_structured_output_streams(server: Server) -> None:
    """with_structured_output(a JSON schema).stream by the default model: partial objects, then the whole one."""
    schema = City.model_json_schema()
    model = chat(f"{server.url}/v1", "default").with_structured_output(schema, method="json_schema")
    found: list[Any] = list(model.stream("Tell me of Paris."))
    City.model_validate(found[-1])


def test_json_mode(scripted: ScriptedServer) -> None:
    """with_structured_output(method="json_mode"): the answer is any JSON object, which LangChain parses."""
    scripted.answer('{"name": "Lima", "continent": "America"}')
    model = chat(scripted.url, scripted.model).with_structured_output(City, method="json_mode")
    assert model.invoke("Tell me of Lima, in JSON.") == City(name="Lima", continent="America")
    assert scripted.requests("grammars")[0]
