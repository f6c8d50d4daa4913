"""Bounds on what a client may send. engine/params.py has the bounds of sampling parameters."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import ApiError

MAX_CHOICES = 128
MAX_PROMPTS = 2**16
MAX_MESSAGES = 4096
"""Largest number of messages in a conversation, and of parts in a message."""
MAX_METADATA = 16
"""Largest number of names in a response's metadata."""
MAX_TOOLS = 128
MAX_CALLS = 128
"""Largest number of calls in a message."""
MAX_FUNCTION_NAME = 64
MAX_STOPS = 16
MAX_STOP_CHARS = 1000
MAX_STOP_TOKENS = 1024
MAX_LOGIT_BIAS = 4096
MAX_ALLOWED_TOKENS = 2**18
"""Largest number of different tokens in allowed_token_ids."""
MAX_BAD_WORDS = 256
MAX_GRAMMAR_CHARS = 2**16
MAX_GRAMMAR_CHOICES = 1024
MAX_CHOICE_CHARS = 2**14
"""Total length of all grammar choices of a request."""
MAX_TOOL_GRAMMAR_CHARS = 2**18
"""Length of the grammar of all functions of a request."""
MAX_SALT_CHARS = 1024
"""Length of a cache_salt."""
MAX_PATH_CHARS = 4096
"""Length of a path of weights."""
MAX_INT = 2**31 - 1
"""Largest count or token id."""


def check_tokens(param: str, tokens: Collection[int], vocab_size: int) -> None:
    """Raise ApiError if the model lacks one of `tokens`."""
    if tokens and (min(tokens) < 0 or max(tokens) >= vocab_size):
        unknown = next(token for token in tokens if not 0 <= token < vocab_size)
        shown = f"{unknown} " if abs(unknown) <= MAX_INT else ""
        raise ApiError(f"{param}: token id {shown}out of range, expected 0 to {vocab_size - 1}", param=param)


class BodyLimit:
    """ASGI middleware that refuses bodies of more than `max_bytes` with 413, and bodies that are incomplete after
    `timeout_s` with 408. It counts the bytes that arrive, however they are framed."""

    def __init__(self, app: ASGIApp, max_bytes: int, timeout_s: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"")
        largest = int(announced) if announced.isdigit() else 0  # a large body is refused before it arrives
        received, whole = 0, False
        deadline = asyncio.get_running_loop().time() + self._timeout_s

        async def counted() -> Message:
            nonlocal received, whole
            message: Message = {}
            if largest <= self._max_bytes:
                try:
                    async with asyncio.timeout_at(None if whole else deadline):
                        message = await receive()
                except TimeoutError:
                    reason = f"the body did not arrive within {self._timeout_s:g} s"
                    raise ApiError(
                        reason, status=408, code="request_timeout", headers={"Connection": "close"}
                    ) from None
                received += len(message.get("body", b""))
                whole = whole or not message.get("more_body", False)
            if max(received, largest) > self._max_bytes:
                reason = f"the body is larger than {self._max_bytes} bytes"
                raise ApiError(reason, status=413, code="body_too_large", headers={"Connection": "close"})
            return message

        await self._app(scope, counted, send)
