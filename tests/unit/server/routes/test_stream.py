"""Streams and long answers end when their client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from starlette.requests import ClientDisconnect

from server.routes.stream import DONE, EventStream, run_while_connected


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
            await EventStream(source(), {})({"type": "http"}, receive, send)
        assert closed.is_set()
        assert sent[0]["type"] == "http.response.start"
        assert sent[-1].get("more_body") is leaves

    asyncio.run(main())


def test_done_is_what_clients_look_for() -> None:
    assert DONE == b"data: [DONE]\n\n"
