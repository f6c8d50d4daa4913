"""Requests of the Responses API, and servers whose model answers a given text."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from models.tokenizer import Tokenizer
from server.service import Service
from tests.support.app import FakeClient, server
from tests.support.contract import RESPONSES
from tests.support.scripted import ScriptedClient

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)

Body = dict[str, Any]


def parse_stream(text: str) -> list[Body]:
    """Parse a stream, and check its frame and that of each event."""
    events = []
    for number, block in enumerate(text.strip().split("\n\n")):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert event["sequence_number"] == number
        EVENT.validate_python(event)
        events.append(event)
    return events


async def ask_both_ways(http: httpx.AsyncClient, body: Body) -> Body:
    """Send a request both ways. Returns the response, of which both must tell the same."""
    answer = await http.post(RESPONSES, json={"seed": 1, **body})
    assert answer.status_code == 200, answer.text
    whole: Body = answer.json()
    Response.model_validate(whole)
    streamed = await http.post(RESPONSES, json={"seed": 1, **body, "stream": True})
    events = parse_stream(streamed.text)
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[0]["response"]["status"] == "in_progress"
    last = events[-1]["response"]
    assert events[-1]["type"] == f"response.{whole['status']}"
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == last["output"]
    assert [without_ids(item) for item in done] == [without_ids(item) for item in whole["output"]]
    assert streamed.headers["content-type"].startswith("text/event-stream")
    assert streamed.headers["x-request-id"] == last["id"] != whole["id"]
    return whole


def without_ids(item: Body) -> Body:
    return {name: value for name, value in item.items() if name not in ("id", "call_id")}


def run_scripted(
    directory: Path, text: str, test: Callable[[httpx.AsyncClient, ScriptedClient, Service], Awaitable[None]]
) -> None:
    """Run a test on a server whose model answers `text`."""

    async def main() -> None:
        client = ScriptedClient(Tokenizer(directory), text)
        async with server(directory, client) as (http, _, service):
            await test(http, client, service)

    asyncio.run(main())


def prompts_of(client: FakeClient, service: Service) -> list[str]:
    """Texts of the prompts so far."""
    return [service.tokenizer.decode(request.prompt, skip_special_tokens=False) for request in client.requests]
