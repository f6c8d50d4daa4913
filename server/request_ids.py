"""The X-Request-Id of a request, which is sent back with its answer and logged."""

from __future__ import annotations

import re
from collections.abc import Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

_NAME = b"x-request-id"
_SAFE = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
"""What the body's field `request_id` allows too."""
_KEY = "magicdec.request_id"


def find_request_id(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """Return the id in `headers`, whose names are in lower case. None: there is none, there are several, or it is
    unsafe to repeat."""
    values = [value for name, value in headers if name == _NAME]
    return values[0].decode("ascii") if len(values) == 1 and _SAFE.fullmatch(values[0]) else None


def given_request_id(scope: Scope) -> str | None:
    """Return the id that RequestIds has found."""
    found: str | None = scope.get(_KEY)
    return found


class RequestIds:
    """ASGI middleware that sends the request's own id back with every answer. It stands inside AccessLog."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = find_request_id(scope["headers"]) if scope["type"] == "http" else None
        if given is None:
            await self._app(scope, receive, send)
            return
        scope[_KEY] = given
        scope["magicdec.facts"]["request_id"] = given

        async def with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                others = [header for header in message.get("headers", ()) if header[0].lower() != _NAME]
                message = {**message, "headers": [*others, (_NAME, given.encode())]}
            await send(message)

        await self._app(scope, receive, with_id)
