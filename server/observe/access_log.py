"""Access log: one line per request, with its status and timing. Never contains text of a prompt."""

from __future__ import annotations

import logging
import time
from typing import Any

from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import printable

_MAX_PATH = 100
_QUIET = frozenset({"/health", "/ready", "/metrics", "/load"})
"""Paths that monitoring polls; logged at debug."""

log = logging.getLogger(__name__)


def add_log_fields(request: Request, **facts: Any) -> None:
    """Add fields to the line of this request. A later value replaces an earlier one of the same name."""
    request.scope.setdefault("magicdec.facts", {}).update(facts)


class AccessLog:
    """ASGI middleware that writes the lines; outermost, so that it sees every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        level = logging.DEBUG if scope["path"] in _QUIET else logging.INFO
        began, status, first = time.monotonic(), 0, 0.0
        facts = scope["magicdec.facts"] = {}

        async def watched(message: Message) -> None:
            nonlocal status, first
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message.get("body") and not first:
                first = time.monotonic()
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            if log.isEnabledFor(level):
                seen: dict[str, Any] = {
                    "method": scope["method"],
                    "path": printable(scope["path"], _MAX_PATH),
                    "status": status or 499,  # the client disconnected before an answer
                    "seconds": round(time.monotonic() - began, 4),
                }
                if first:
                    seen["first_byte_seconds"] = round(first - began, 4)
                client = scope.get("client")
                if client:
                    seen["client"] = client[0]
                seen |= {name: value() if callable(value) else value for name, value in facts.items()}
                log.log(level, "request", extra={"facts": seen})
