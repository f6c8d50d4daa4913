"""smolagents: ToolCallingAgent, whose answer is a call of final_answer."""

from __future__ import annotations

from smolagents import OpenAIServerModel, ToolCallingAgent, tool
from smolagents.models import ChatMessage, MessageRole

from tests.support.client_servers import WEATHER_CALL, ScriptedServer
from tests.support.servers import PATIENCE_S, Server

FINAL = '<tool_call>\n{"name": "final_answer", "arguments": {"answer": "17 degrees"}}\n</tool_call>'


@tool
def get_weather(city: str) -> str:
    """Look up the weather.

    Args:
        city: Name of the city.
    """
    return f"{city}: 17 degrees"


def model(url: str, name: str) -> OpenAIServerModel:
    return OpenAIServerModel(
        name, api_base=url, api_key="none", client_kwargs={"timeout": PATIENCE_S, "max_retries": 0}
    )


def test_agent(scripted: ScriptedServer) -> None:
    """ToolCallingAgent.run: a call of a tool, then of final_answer."""
    scripted.answer(WEATHER_CALL, FINAL)
    agent = ToolCallingAgent(tools=[get_weather], model=model(scripted.url, scripted.model), verbosity_level=0)
    assert agent.run("What is the weather in Ulm?") == "17 degrees"
    assert "Ulm: 17 degrees" in scripted.prompts()[1]


def test_streaming_agent(scripted: ScriptedServer) -> None:
    """ToolCallingAgent(stream_outputs=True): the same, streamed."""
    scripted.answer(WEATHER_CALL, FINAL)
    agent = ToolCallingAgent(
        tools=[get_weather], model=model(scripted.url, scripted.model), stream_outputs=True, verbosity_level=0
    )
    assert agent.run("What is the weather in Ulm?") == "17 degrees"
    assert "Ulm: 17 degrees" in scripted.prompts()[1]


def test_call_by_the_default_model(server: Server) -> None:
    """OpenAIServerModel.generate with tools, which requires a call, by the default model."""
    question = ChatMessage(MessageRole.USER, [{"type": "text", "text": "What is the weather in Ulm?"}])
    answer = model(f"{server.url}/v1", "default").generate(
        [question], tools_to_call_from=[get_weather], temperature=0, parallel_tool_calls=False
    )
    assert answer.tool_calls
    assert {call.function.name for call in answer.tool_calls} == {"get_weather"}
