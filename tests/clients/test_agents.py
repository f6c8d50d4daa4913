"""OpenAI Agents SDK: function tools, structured output and handoffs, over chat completions and over responses."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest
from agents import (
    Agent,
    Model,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
)
from openai import AsyncOpenAI

from tests.support.client_servers import WEATHER_CALL, City, ScriptedServer
from tests.support.servers import PATIENCE_S, Server

HANDOFF = '<tool_call>\n{"name": "transfer_to_weather_agent", "arguments": {}}\n</tool_call>'

Models = Callable[[str, str], Model]
GREEDY = ModelSettings(temperature=0)


@function_tool
def get_weather(city: str) -> str:
    """Look up the weather."""
    return f"{city}: 17 degrees"


@pytest.fixture(params=[OpenAIChatCompletionsModel, OpenAIResponsesModel])
def model(request: pytest.FixtureRequest) -> Models:
    """Return a function that makes models of one kind, from an address and a name."""

    def make(url: str, name: str) -> Model:
        client = AsyncOpenAI(base_url=url, api_key="none", timeout=PATIENCE_S, max_retries=0)
        made: Model = request.param(model=name, openai_client=client)
        return made

    return make


def test_function_tool(scripted: ScriptedServer, model: Models) -> None:
    """Runner.run: an agent calls a function_tool and answers from its result."""
    scripted.answer(f"<think>\nI look it up.\n</think>\n\n{WEATHER_CALL}", "It has 17 degrees.")
    agent = Agent(name="Helper", instructions="Help.", model=model(scripted.url, scripted.model), tools=[get_weather])
    found = asyncio.run(Runner.run(agent, "What is the weather in Ulm?"))
    assert found.final_output == "It has 17 degrees."
    assert "Ulm: 17 degrees" in scripted.prompts()[1]


def test_stream(scripted: ScriptedServer, model: Models) -> None:
    """Runner.run_streamed: the same with events."""

    async def run() -> tuple[list[str], Any]:
        agent = Agent(name="Helper", model=model(scripted.url, scripted.model), tools=[get_weather])
        running = Runner.run_streamed(agent, "What is the weather in Ulm?")
        kinds = [event.item.type async for event in running.stream_events() if event.type == "run_item_stream_event"]
        return kinds, running.final_output

    scripted.answer(WEATHER_CALL, "It has 17 degrees.")
    kinds, output = asyncio.run(run())
    assert kinds == ["tool_call_item", "tool_call_output_item", "message_output_item"]
    assert output == "It has 17 degrees."
    assert "Ulm: 17 degrees" in scripted.prompts()[1]


def test_handoff(scripted: ScriptedServer, model: Models) -> None:
    """Handoff to another agent, which calls its own tool."""
    scripted.answer(HANDOFF, WEATHER_CALL, "It has 17 degrees.")
    served = model(scripted.url, scripted.model)
    weather = Agent(name="Weather agent", instructions="Tell the weather.", model=served, tools=[get_weather])
    triage = Agent(name="Triage", instructions="Find the right agent.", model=served, handoffs=[weather])
    found = asyncio.run(Runner.run(triage, "What is the weather in Ulm?"))
    assert found.last_agent is weather
    assert found.final_output == "It has 17 degrees."
    first, second, _ = scripted.prompts()
    assert "transfer_to_weather_agent" in first
    assert "get_weather" not in first
    assert "Tell the weather." in second


def test_output_type(server: Server, model: Models) -> None:
    """Agent(output_type=a pydantic model) by the default model."""
    agent = Agent(
        name="Geographer", model=model(f"{server.url}/v1", "default"), output_type=City, model_settings=GREEDY
    )
    assert isinstance(asyncio.run(Runner.run(agent, "Tell me of Paris.")).final_output, City)


def test_required_tool(server: Server, model: Models) -> None:
    """ModelSettings(tool_choice="required") with tool_use_behavior="stop_on_first_tool" by the default model."""
    called: list[str] = []

    @function_tool
    def note(city: Literal["Paris", "Lima"]) -> str:
        """Note a city."""
        called.append(city)
        return city

    agent = Agent(
        name="Clerk",
        model=model(f"{server.url}/v1", "default"),
        tools=[note],
        model_settings=replace(GREEDY, tool_choice="required", parallel_tool_calls=False),
        tool_use_behavior="stop_on_first_tool",
    )
    found = asyncio.run(Runner.run(agent, "Note Lima."))
    assert [found.final_output] == called
    assert called[0] in ("Paris", "Lima")
