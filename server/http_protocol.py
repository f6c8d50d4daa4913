"""uvicorn's HTTP/1.1 protocol, with bounds on request line and headers, and answers that reach a client that is still
sending."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from server.errors import ApiError
from server.request_ids import find_request_id

MAX_HEAD_BYTES = 64 * 1024
"""Maximum size of request line and headers."""
LINGER_BYTES = 256 * 2**20
"""Maximum number of bytes that are read and dropped after an answer to an unfinished request."""
LINGER_S = 30.0
"""Maximum time for that."""
WRITE_S = 60.0
"""Maximum time in which a client reads nothing of what it is sent."""
MAX_PIPELINED = 8
"""Maximum number of requests that wait for the answer to an earlier one on their connection."""
_REASONS = {400: "Bad Request", 408: "Request Timeout", 431: "Request Header Fields Too Large"}


def protocol(head_timeout_s: float) -> Callable[..., asyncio.Protocol]:
    """Return the protocol factory that uvicorn calls for each connection. head_timeout_s: from the start of the
    connection, or of a further request, until all headers have arrived."""
    return partial(_Protocol, head_timeout_s=head_timeout_s)


class _Protocol(HttpToolsProtocol):
    """One connection.

    A socket that is closed with unread data in it resets the connection, and the client may lose the answer. So the
    connection of an unfinished request lingers: it ends its own side, then reads and drops what the client still sends.
    """

    def __init__(self, *arguments: Any, head_timeout_s: float, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._head_timeout_s = head_timeout_s
        self._head_timer: asyncio.TimerHandle | None = None
        self._head_bytes = 0
        self._head_end = b""
        """The latest bytes of a head, in which its end may have begun."""
        self._in_head = True
        self._linger_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._answered: RequestResponseCycle | None = None
        """The request that is being answered, or was last; `cycle` is the newest one."""
        self._dropped = 0
        self.ignores_input = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(_Transport(transport, self))  # type: ignore[arg-type]
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_is_there()
        if self._linger_timer is not None:
            self._linger_timer.cancel()
        self._write_is_over()
        super().connection_lost(exc)
        if self._answered is not None and not self._answered.response_complete:
            self._answered.disconnected = True
            self._answered.message_event.set()

    def data_received(self, data: bytes) -> None:
        if self.ignores_input:
            self._dropped += len(data)
            if self._dropped > LINGER_BYTES:
                self.transport.abort()
            return
        if self._in_head:
            self._head_bytes += len(data)
            seen, self._head_end = self._head_end + data, (self._head_end + data[-3:])[-3:]
            # One packet can hold the head and much of a body, so only a head that has not ended is refused.
            if self._head_bytes > MAX_HEAD_BYTES and b"\r\n\r\n" not in seen:
                self._refuse(431, "the headers are too large", "headers_too_large")
                return
        super().data_received(data)
        if (
            not self._in_head
            and self.cycle is not None
            and self.cycle.response_complete
            and self.timeout_keep_alive_task is None
        ):
            # Empty lines begin no request: the connection is as idle as before.
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_is_over()
        self._write_timer = self.loop.call_later(WRITE_S, self.transport.abort)

    def resume_writing(self) -> None:
        self._write_is_over()
        super().resume_writing()

    def _write_is_over(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    # One packet can hold several requests: the parser goes on after one that was refused.

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._head_timer is None and not self.ignores_input:
            self._await_head()
            self._head_bytes = 1  # of this packet, which is not counted

    def on_headers_complete(self) -> None:
        if self.ignores_input:
            return
        self._head_is_there()
        if sum(len(name) + len(value) for name, value in self.headers) + len(self.url) > MAX_HEAD_BYTES:
            self._refuse(431, "the headers are too large", "headers_too_large")
            return
        super().on_headers_complete()
        if self.parser.should_upgrade():
            self.cycle.keep_alive = False  # no upgrade is served, and the parser reads nothing after such a request
        if len(self.pipeline) <= MAX_PIPELINED:
            self.flow.resume_reading()  # else nobody would see that the client leaves

    def on_body(self, body: bytes) -> None:
        if not self.ignores_input:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self.ignores_input:
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer invalid HTTP with the same error body as any other error."""
        self._refuse(400, msg, "invalid_http")

    def _unsupported_upgrade_warning(self) -> None:
        """Log nothing: some clients offer an upgrade to HTTP/2 with their first request."""

    def shutdown(self) -> None:
        if self.lingers:
            self.transport.abort()
        else:
            super().shutdown()

    # -- closing -------------------------------------------------------------------------------------------------------

    @property
    def lingers(self) -> bool:
        return self._linger_timer is not None

    @property
    def unfinished(self) -> bool:
        """Whether the newest request has not arrived as a whole."""
        return self.cycle is not None and self.cycle.more_body

    def linger(self, transport: asyncio.Transport) -> None:
        """Close the connection once the client has ended its side too, or after LINGER_BYTES or LINGER_S."""
        self._head_is_there()
        self.ignores_input = True
        self._linger_timer = self.loop.call_later(LINGER_S, transport.abort)
        if transport.can_write_eof():
            transport.write_eof()
        self.flow.resume_reading()

    # -- answers -------------------------------------------------------------------------------------------------------

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGIApp) -> None:  # type: ignore[override]
        self._answered = cycle
        super()._start_asgi_task(cycle, _Framed(cycle, app))  # type: ignore[arg-type]

    def _await_head(self) -> None:
        self._in_head, self._head_bytes, self._head_end = True, 0, b""
        self._head_timer = self.loop.call_later(self._head_timeout_s, self._late)

    def _head_is_there(self) -> None:
        self._in_head = False
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _late(self) -> None:
        if self._head_bytes:
            self._refuse(408, f"no headers within {self._head_timeout_s:g} s", "request_timeout")
        else:
            self.transport.close()  # no request has begun

    def _refuse(self, status: int, message: str, code: str) -> None:
        """Answer and close. While earlier requests on the connection are being answered, close after that instead."""
        if self.transport.is_closing() or self.ignores_input:
            return
        self._head_is_there()
        self.ignores_input = True
        if self.cycle is not None and not self.cycle.response_complete:
            if not self.cycle.more_body or self.cycle.response_started or self.pipeline:
                self.cycle.keep_alive = False
                return
            # The body of this request is what is invalid, so nobody else answers it.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        body = msgspec.json.encode(ApiError(message, status=status, code=code).body())
        head = f"HTTP/1.1 {status} {_REASONS[status]}\r\nconnection: close\r\ncontent-type: application/json\r\n"
        if (request_id := find_request_id(self.headers or ())) is not None:
            head += f"x-request-id: {request_id}\r\n"
        self.transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        self.transport.close()


class _Transport:
    """Transport that lingers instead of closing where the client may still be sending."""

    def __init__(self, transport: asyncio.Transport, connection: _Protocol) -> None:
        self._transport = transport
        self._connection = connection

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self._connection.lingers or self._transport.is_closing()

    def write(self, data: bytes) -> None:
        if not self.is_closing():
            self._transport.write(data)

    def close(self) -> None:
        if self.is_closing():
            return
        if self._connection.unfinished or self._connection.ignores_input:
            self._connection.linger(self._transport)
        else:
            self._transport.close()


class _Framed:
    """Application whose answers are framed as the request needs it.

    An answer to an unfinished request announces that it is the connection's last one: the rest of the request may be
    long, or never come. HTTP/1.0 has no chunks: there the end of the connection ends an answer without a length.
    """

    def __init__(self, cycle: RequestResponseCycle, app: ASGIApp) -> None:
        self._cycle = cycle
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        cycle, raw = self._cycle, False

        async def framed(message: Message) -> None:
            nonlocal raw
            if message["type"] == "http.response.start":
                names = {name.lower() for name, _ in message.get("headers", ())}
                if cycle.more_body and b"connection" not in names:
                    message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
                raw = scope["http_version"] == "1.0" and b"content-length" not in names
                if raw:
                    cycle.chunked_encoding = False
            elif raw:
                cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        await self._app(scope, receive, framed)
