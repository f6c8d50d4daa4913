"""pydantic-ai: tools, and structured output by a tool, natively and by prompt."""

from __future__ import annotations

from typing import Any

import pytest
from openai import AsyncOpenAI
from pydantic_ai import Agent, NativeOutput, PromptedOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

from tests.support.client_servers import WEATHER_CALL, City, ScriptedServer
from tests.support.servers import PATIENCE_S, Server


def model(url: str, name: str) -> OpenAIChatModel:
    client = AsyncOpenAI(base_url=url, api_key="none", timeout=PATIENCE_S, max_retries=0)
    return OpenAIChatModel(name, provider=OpenAIProvider(openai_client=client))


def get_weather(city: str) -> str:
    """Look up the weather."""
    return f"{city}: 17 degrees"


def test_tool(scripted: ScriptedServer) -> None:
    """Agent(tools=…).run_sync: a call, then the answer from its result."""
    scripted.answer(f"<think>\nI look it up.\n</think>\n\n{WEATHER_CALL}", "It has 17 degrees.")
    agent = Agent(model(scripted.url, scripted.model), tools=[get_weather], instructions="Help.")
    assert agent.run_sync("What is the weather in Ulm?").output == "It has 17 degrees."
    assert "Ulm: 17 degrees" in scripted.prompts()[1]


def test_tool_streamed(scripted: ScriptedServer) -> None:
    """Agent(tools=…).run_stream_sync: the same, streamed."""
    scripted.answer(WEATHER_CALL, "It has 17 degrees.")
    agent = Agent(model(scripted.url, scripted.model), tools=[get_weather])
    assert list(agent.run_stream_sync("What is the weather in Ulm?").stream_text())[-1] == "It has 17 degrees."


@pytest.mark.parametrize("output", [City, ToolOutput(City), NativeOutput(City)], ids=["default", "tool", "native"])
def test_structured_output(server: Server, output: Any) -> None:
    """Agent(output_type=…) by the default model: by default (a tool), ToolOutput, NativeOutput."""
    agent: Agent[None, City] = Agent(model(f"{server.url}/v1", "default"), output_type=output, retries=0)
    assert isinstance(agent.run_sync("Tell me of Paris.", model_settings={"temperature": 0}).output, City)


def test_prompted_output(scripted: ScriptedServer) -> None:
    """Agent(output_type=PromptedOutput(…)): the schema is in the prompt, the answer any JSON object."""
    scripted.answer('{"name": "Lima", "continent": "America"}')
    agent = Agent(model(scripted.url, scripted.model), output_type=PromptedOutput(City), retries=0)
    assert agent.run_sync("Tell me of Lima.").output == City(name="Lima", continent="America")
    assert scripted.requests("grammars")[0]
