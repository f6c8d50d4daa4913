"""Answers that must end when the client disconnects: server-sent events, and JSON bodies that take long."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing
from typing import Any, Protocol, TypeVar

import msgspec
from fastapi import Request, Response
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from server.errors import as_api_error
from server.generation import Generation
from server.observe.access_log import add_log_fields

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
"""A comment, which clients ignore: it keeps proxies from closing a connection that they take for idle."""


def event(data: Any) -> bytes:
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


def typed_event(data: Any) -> bytes:
    """Encode an event whose `type` is its name too."""
    name: str = data["type"]
    return b"event: " + name.encode() + b"\n" + event(data)


async def wait_disconnected(receive: Receive) -> None:
    """Wait until the client disconnects. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def run_until(end: Coroutine[Any, Any, object], work: Coroutine[Any, Any, T], late: Exception) -> T:
    """Return the result of `work`. If `end` returns first, cancel `work` and raise `late`."""
    task = asyncio.create_task(work)
    ending = asyncio.create_task(end)
    try:
        await asyncio.wait({task, ending}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise late
        return task.result()
    finally:
        task.cancel()
        ending.cancel()
        await asyncio.gather(task, ending, return_exceptions=True)


async def run_while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`. If the client disconnects first, cancel it and raise ClientDisconnect."""
    return await run_until(wait_disconnected(receive), work, ClientDisconnect())


class Answer(Protocol):
    """Answer of a completion route to one request: in one piece, or event by event."""

    id: str
    generation: Generation

    async def whole(self) -> Any: ...
    def events(self) -> AsyncGenerator[Any, None]:
        """Yield events. None is not sent: it only says that the request has been accepted."""


async def respond(
    request: Request,
    answer: Answer,
    streaming: bool,
    *,
    encode: Callable[[Any], bytes] = event,
    done: bool = True,
) -> Response:
    """Send `answer`. Its work ends with it, or when the client disconnects. encode, done: see `stream`.

    X-Request-Id: RequestIds puts the request's own in the place of the answer's id.
    """
    headers = {"X-Request-Id": answer.id}
    add_log_fields(request, id=answer.id, **answer.generation.facts)
    answer.generation.parent = request.headers.get("traceparent")
    if streaming:
        ping_s = request.app.state.service.config.server.ping_s
        return await stream(request, answer.events(), headers, ping_s, encode=encode, done=done)
    body = msgspec.json.encode(await run_while_connected(request.receive, answer.whole()))
    return Response(body, headers=headers, media_type="application/json")


async def stream(
    request: Request,
    events: AsyncGenerator[Any, None],
    headers: Mapping[str, str],
    ping_s: float,
    *,
    encode: Callable[[Any], bytes] = event,
    done: bool = True,
) -> Response:
    """Answer with `events` (JSON values; None is not sent), and with [DONE] if `done`.

    Errors before the first event are raised, so that they are answered with their own status. ping_s: see EventStream.
    encode: writes an event.
    """

    async def first() -> Any:
        return await anext(events)

    try:
        head = await run_while_connected(request.receive, first())
    except BaseException:
        await events.aclose()
        raise
    return EventStream(_encoded(head, events, encode, done), headers, ping_s)


async def _encoded(
    head: Any, events: AsyncGenerator[Any, None], encode: Callable[[Any], bytes], done: bool
) -> AsyncGenerator[bytes, None]:
    async with aclosing(events):
        try:
            if head is not None:
                yield encode(head)
            async for item in events:
                if item is not None:
                    yield encode(item)
        except Exception as error:
            yield event(as_api_error(error).body())
        if done:
            yield DONE


class EventStream(Response):
    """Response that sends until the source ends or the client disconnects, then closes the source.

    Headers are sent at once, and a comment whenever nothing has been sent for `ping_s` seconds; 0: never.
    """

    media_type = "text/event-stream"

    def __init__(self, source: AsyncGenerator[bytes, None], headers: Mapping[str, str], ping_s: float) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers})
        del self.headers["content-length"]
        self._source = source
        self._ping_s = ping_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._source):
            try:
                await run_while_connected(receive, self._send(send))
            except ClientDisconnect:
                return

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        clock = asyncio.get_running_loop().time
        sending, sent = asyncio.Lock(), clock()

        async def send_chunk(chunk: bytes) -> None:
            nonlocal sent
            async with sending:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            sent = clock()

        async def ping() -> None:
            while True:
                silent = clock() - sent
                if silent < self._ping_s:
                    await asyncio.sleep(self._ping_s - silent)
                else:
                    await send_chunk(PING)

        pings = asyncio.create_task(ping()) if self._ping_s else None
        try:
            async for chunk in self._source:
                await send_chunk(chunk)
        finally:
            if pings is not None:
                pings.cancel()
                await asyncio.gather(pings, return_exceptions=True)
        await send({"type": "http.response.body", "body": b"", "more_body": False})
