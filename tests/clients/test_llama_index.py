"""LlamaIndex: FunctionAgent and structured output with OpenAILike."""

from __future__ import annotations

import asyncio

from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

from tests.support.client_servers import WEATHER_CALL, City, ScriptedServer
from tests.support.servers import PATIENCE_S, Server


def get_weather(city: str) -> str:
    """Look up the weather."""
    return f"{city}: 17 degrees"


def model(url: str, name: str) -> OpenAILike:
    return OpenAILike(
        model=name,
        api_base=url,
        api_key="none",
        temperature=0,
        is_chat_model=True,
        is_function_calling_model=True,
        timeout=PATIENCE_S,
        max_retries=0,
    )


def run(agent: FunctionAgent) -> str:
    async def ask() -> str:
        return str(await agent.run("What is the weather in Ulm?"))

    return asyncio.run(ask())


def test_agent(scripted: ScriptedServer) -> None:
    """FunctionAgent(streaming=False).run: a call, then the answer from its result."""
    scripted.answer(WEATHER_CALL, "It has 17 degrees.")
    agent = FunctionAgent(tools=[get_weather], llm=model(scripted.url, scripted.model), streaming=False)
    assert run(agent) == "It has 17 degrees."
    assert "Ulm: 17 degrees" in scripted.prompts()[1]


def test_streaming_agent(scripted: ScriptedServer) -> None:
    """FunctionAgent.run, which streams by default."""
    scripted.answer(f"<think>\nI look it up.\n</think>\n\n{WEATHER_CALL}", "It has 17 degrees.")
    assert run(FunctionAgent(tools=[get_weather], llm=model(scripted.url, scripted.model))) == "It has 17 degrees."
    assert "Ulm: 17 degrees" in scripted.prompts()[1]


def test_structured_output(server: Server) -> None:
    """as_structured_llm(a pydantic model).chat by the default model: a required call."""
    llm = model(f"{server.url}/v1", "default").as_structured_llm(City)
    assert isinstance(llm.chat([ChatMessage(role="user", content="Tell me of Paris.")]).raw, City)
