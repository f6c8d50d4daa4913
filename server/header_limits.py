"""uvicorn's HTTP/1.1 protocol, with bounds on the time and the size of request line and headers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.errors import ApiError

MAX_HEAD_BYTES = 64 * 1024
"""Maximum size of request line and headers."""
_REASONS = {400: "Bad Request", 408: "Request Timeout", 431: "Request Header Fields Too Large"}


def protocol(head_timeout_s: float) -> Callable[..., asyncio.Protocol]:
    """Return the protocol factory that uvicorn calls for each connection. head_timeout_s: from the start of the
    connection, or of a further request, until all headers have arrived."""
    return partial(_Protocol, head_timeout_s=head_timeout_s)


class _Protocol(HttpToolsProtocol):
    def __init__(self, *arguments: Any, head_timeout_s: float, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._head_timeout_s = head_timeout_s
        self._head_timer: asyncio.TimerHandle | None = None
        self._head_bytes = 0
        self._in_head = True

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_is_there()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._head_bytes += len(data)
            # One packet can hold the head and much of a body, so only a head that has not ended is refused.
            if self._head_bytes > MAX_HEAD_BYTES and b"\r\n\r\n" not in data:
                self._refuse(431, "the headers are too large", "headers_too_large")
                return
        super().data_received(data)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._head_timer is None:
            self._await_head()

    def on_headers_complete(self) -> None:
        self._head_is_there()
        if sum(len(name) + len(value) for name, value in self.headers) + len(self.url) > MAX_HEAD_BYTES:
            self._refuse(431, "the headers are too large", "headers_too_large")
            return
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer invalid HTTP with the same error body as any other error."""
        self._refuse(400, msg, "invalid_http")

    def _await_head(self) -> None:
        self._in_head, self._head_bytes = True, 0
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
        if self.transport.is_closing():
            return
        body = msgspec.json.encode(ApiError(message, status=status, code=code).body())
        head = f"HTTP/1.1 {status} {_REASONS[status]}\r\nconnection: close\r\ncontent-type: application/json\r\n"
        self.transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        self.transport.close()
