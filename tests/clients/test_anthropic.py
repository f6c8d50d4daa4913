"""anthropic: messages.create and stream with tools, and count_tokens, by Anthropic and AsyncAnthropic."""

from __future__ import annotations

import asyncio
from typing import Any

import anthropic
import pytest

from tests.support.client_servers import WEATHER_CALL, City, ScriptedServer
from tests.support.servers import PATIENCE_S, Server

QUESTION = {"role": "user", "content": "What is the weather in Ulm?"}
WEATHER = {
    "name": "get_weather",
    "description": "Look up the weather.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


def options(model: str, **more: Any) -> Any:
    return {"model": model, "max_tokens": 500, "messages": [QUESTION], "tools": [WEATHER], **more}


@pytest.fixture
def client(scripted: ScriptedServer) -> Any:
    return anthropic.Anthropic(base_url=scripted.root, api_key="none", timeout=PATIENCE_S, max_retries=0)


def test_tools(client: Any, scripted: ScriptedServer) -> None:
    """messages.create(tools=…): thinking, text and a call, then the answer from its result."""
    scripted.answer(f"<think>\nI look it up.\n</think>\n\nLooking. {WEATHER_CALL}", "It has 17 degrees.")
    thinking = {"type": "enabled", "budget_tokens": 1024}
    first = client.messages.create(**options(scripted.model, max_tokens=2048, thinking=thinking))
    assert first.stop_reason == "tool_use"
    assert [block.type for block in first.content] == ["thinking", "text", "tool_use"]
    call = first.content[-1]
    assert (call.name, call.input) == ("get_weather", {"city": "Ulm"})
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "17 degrees"}
    messages = [QUESTION, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    second = client.messages.create(**options(scripted.model, messages=messages))
    assert (second.content[0].text, second.stop_reason) == ("It has 17 degrees.", "end_turn")
    assert second.usage.output_tokens > 0
    for part in ("Look up the weather.", "I look it up.", "17 degrees"):
        assert part in scripted.prompts()[1]


def test_stream(client: Any, scripted: ScriptedServer) -> None:
    """messages.stream: text_stream, and the message at the end."""
    scripted.answer(f"Looking. {WEATHER_CALL}")
    with client.messages.stream(**options(scripted.model)) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text.strip() == "Looking."
    assert final.content[-1].input == {"city": "Ulm"}
    assert final.stop_reason == "tool_use"


def test_async(scripted: ScriptedServer) -> None:
    """AsyncAnthropic: messages.stream with its events, those of thinking too."""
    thinking = {"type": "enabled", "budget_tokens": 1024}

    async def ask() -> tuple[set[str], Any]:
        async with (
            anthropic.AsyncAnthropic(base_url=scripted.root, api_key="none", max_retries=0) as client,
            client.messages.stream(**options(scripted.model, max_tokens=2048, thinking=thinking)) as stream,
        ):
            return {event.type async for event in stream}, await stream.get_final_message()

    scripted.answer(f"<think>\nI look it up.\n</think>\n\n{WEATHER_CALL}")
    kinds, final = asyncio.run(ask())
    assert {"thinking", "input_json", "content_block_stop", "message_stop"} <= kinds
    assert final.content[-1].input == {"city": "Ulm"}


def test_count_tokens(client: Any, scripted: ScriptedServer) -> None:
    """messages.count_tokens: as many as messages.create uses."""
    scripted.answer("It has 17 degrees.")
    count = client.messages.count_tokens(model=scripted.model, messages=[QUESTION], tools=[WEATHER])
    assert count.input_tokens == client.messages.create(**options(scripted.model)).usage.input_tokens


def test_forced_call(server: Server) -> None:
    """tool_choice={"type": "tool", …} by the default model."""
    client = anthropic.Anthropic(base_url=server.url, api_key="none", timeout=PATIENCE_S, max_retries=0)
    tell = {"name": "tell", "input_schema": City.model_json_schema()}
    choice = {"type": "tool", "name": "tell", "disable_parallel_tool_use": True}
    answer = client.messages.create(
        **options("default", tools=[WEATHER, tell], tool_choice=choice, extra_body={"temperature": 0})
    )
    (call,) = [block for block in answer.content if block.type == "tool_use"]
    City.model_validate(call.input)


def test_refusal(client: Any, scripted: ScriptedServer) -> None:
    """Errors are those of the package."""
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(**options("another"))
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        client.messages.create(**options(scripted.model, max_tokens=0))
