"""Streams begin once the engine has accepted them, and end, like long answers, when their client leaves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import ClientDisconnect

from engine.messages import AddRequest, RequestOutput
from server.app import create_app
from server.routes.stream import DONE, PING, EventStream, run_while_connected
from server.service import Service
from tests.support.app import FakeClient, server
from tests.support.contract import CHAT, COMPLETIONS, USER
from tests.support.fake_engine import FULL, REFUSE


def test_while_there_cancels_the_work_of_a_client_that_left() -> None:
    async def main() -> None:
        cancelled = asyncio.Event()

        async def work() -> None:
            try:
                await asyncio.sleep(60)
            finally:
                cancelled.set()

        messages: list[dict[str, Any]] = [{"type": "http.request", "body": b""}, {"type": "http.disconnect"}]

        async def receive() -> dict[str, Any]:
            return messages.pop(0)

        with pytest.raises(ClientDisconnect):
            await run_while_connected(receive, work())
        assert cancelled.is_set()

    asyncio.run(main())


@pytest.mark.parametrize("leaves", [True, False])
def test_a_stream_closes_its_source(leaves: bool) -> None:
    async def main() -> None:
        closed = asyncio.Event()

        async def source() -> AsyncGenerator[bytes, None]:
            try:
                while True:
                    yield b"x"
                    await asyncio.sleep(0)
                    if not leaves:
                        return
            finally:
                closed.set()

        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        async def receive() -> dict[str, Any]:
            while not leaves or len(sent) < 5:
                await asyncio.sleep(0)
            return {"type": "http.disconnect"}

        async with asyncio.timeout(10):
            await EventStream(source(), {}, 0)({"type": "http"}, receive, send)
        assert closed.is_set()
        assert sent[0]["type"] == "http.response.start"
        assert sent[-1].get("more_body") is leaves

    asyncio.run(main())


def test_done_is_what_clients_look_for() -> None:
    assert DONE == b"data: [DONE]\n\n"


class Exchange:
    """One streamed request to the application, whose messages are seen as they are sent."""

    def __init__(self, service: Service, path: str, body: dict[str, Any]) -> None:
        self.sent: list[dict[str, Any]] = []
        self._more = asyncio.Event()
        self._body: bytes | None = json.dumps({**body, "stream": True}).encode()
        scope = {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b""}
        self.task = asyncio.create_task(create_app(service)(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        if self._body is None:
            await asyncio.Event().wait()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body}

    async def _send(self, message: Any) -> None:
        self.sent.append(message)
        self._more.set()

    async def messages(self, number: int) -> list[dict[str, Any]]:
        """Wait until so many messages have been sent, and return all."""
        async with asyncio.timeout(10):
            while len(self.sent) < number:
                self._more.clear()
                await self._more.wait()
        return self.sent


def hold(client: FakeClient, monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Let requests be accepted, and hold back their tokens until the returned event is set."""
    release, original = asyncio.Event(), client.generate

    async def held(request: AddRequest) -> AsyncGenerator[RequestOutput, None]:
        async with aclosing(original(request)) as outputs:
            async for output in outputs:
                if not output.queued:
                    await release.wait()
                yield output

    monkeypatch.setattr(client, "generate", held)
    return release


def test_a_chat_begins_before_its_first_token(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Headers and the role of each choice are sent at once, then nothing but pings until the first token."""

    async def main() -> None:
        async with server(directory, ping_s=0.01) as (_, client, service):
            release = hold(client, monkeypatch)
            exchange = Exchange(service, CHAT, {"messages": USER, "n": 2, "max_tokens": 5})
            start, *chunks = await exchange.messages(6)
            assert (start["type"], start["status"]) == ("http.response.start", 200)
            roles = [json.loads(chunk["body"][6:])["choices"][0] for chunk in chunks[:2]]
            assert sorted(role["index"] for role in roles) == [0, 1]
            assert {json.dumps(role["delta"]) for role in roles} == {'{"role": "assistant", "content": ""}'}
            assert {chunk["body"] for chunk in chunks[2:]} == {PING}
            release.set()
            await exchange.task
            told = [message["body"] for message in exchange.sent[1:] if message["body"] not in (PING, DONE, b"")]
            assert sum(b'"role"' in body for body in told) == 2
            assert len(told) > 4
            assert [message["body"] for message in exchange.sent[-2:]] == [DONE, b""]

    asyncio.run(main())


@pytest.mark.parametrize("echo", [False, True])
def test_a_completion_begins_before_its_first_token(
    directory: Path, monkeypatch: pytest.MonkeyPatch, echo: bool
) -> None:
    async def main() -> None:
        async with server(directory, ping_s=0) as (http, client, service):
            body = {"prompt": [[10], [11]], "max_tokens": 5, "seed": 3, "echo": echo}
            release = hold(client, monkeypatch)
            exchange = Exchange(service, COMPLETIONS, body)
            (start,) = await exchange.messages(1)
            assert start["status"] == 200
            for _ in range(50):
                await asyncio.sleep(0)
            assert len(exchange.sent) == 1
            release.set()
            await exchange.task
            texts = ["", ""]
            for message in exchange.sent[1:-2]:
                (choice,) = json.loads(message["body"][6:])["choices"]
                texts[choice["index"]] += choice["text"]
            whole = (await http.post(COMPLETIONS, json=body)).json()
            assert texts == [choice["text"] for choice in whole["choices"]]

    asyncio.run(main())


@pytest.mark.parametrize(("first", "status", "code"), [(REFUSE, 400, "cannot_serve"), (FULL, 503, "queue_full")])
def test_a_refusal_of_any_choice_comes_before_the_headers(directory: Path, first: int, status: int, code: str) -> None:
    """Also if the engine has accepted other choices already, and they have tokens."""

    async def main() -> None:
        async with server(directory) as (http, client, _):
            original = client.generate

            async def late(request: AddRequest) -> AsyncGenerator[RequestOutput, None]:
                async for output in original(request):
                    if request.prompt == [first]:
                        await asyncio.sleep(0.02)
                    yield output

            client.generate = late  # type: ignore[method-assign]
            body = {"prompt": [[10], [first]], "max_tokens": 50, "stream": True}
            answer = await http.post(COMPLETIONS, json=body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)

    asyncio.run(main())


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_request_that_runs_again_is_not_begun_again(
    directory: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """A replaced engine acknowledges the request once more; the stream shows nothing of it."""

    async def main() -> None:
        async with server(directory) as (http, client, _):
            body: dict[str, Any] = {"max_tokens": 5, "seed": 3, "stream": True}
            body |= {"prompt": [10]} if path == COMPLETIONS else {"messages": USER}

            async def choices() -> list[Any]:
                blocks = (await http.post(path, json=body)).text.split("\n\n")
                return [json.loads(block[6:])["choices"] for block in blocks if block.startswith("data: {")]

            once, original = await choices(), client.generate

            async def twice(request: AddRequest) -> AsyncGenerator[RequestOutput, None]:
                yield RequestOutput(request.id, queued=True)
                async for output in original(request):
                    yield output

            monkeypatch.setattr(client, "generate", twice)
            assert await choices() == once

    asyncio.run(main())


def test_an_acknowledgement_is_no_round(directory: Path) -> None:
    """Neither reports nor metrics count it."""

    async def main() -> None:
        async with server(directory) as (http, _, service):
            body = {"prompt": [10], "max_tokens": 6, "speculation": {"report": True}}
            (choice,) = (await http.post(COMPLETIONS, json=body)).json()["choices"]
            assert choice["speculation"]["rounds"] == 2
            assert (
                'magicdec_time_to_first_token_seconds_count{model_name="tiny"} 1.0' in service.metrics.text().decode()
            )

    asyncio.run(main())
