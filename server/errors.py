"""Error answers: short messages, in the shape of the API that the route belongs to."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Mapping
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.processes.client import EngineDead
from engine.processes.supervisor import EngineDown

MAX_MESSAGE = 500
"""Maximum length of a message, in characters."""
_MAX_NAME = 64
"""Maximum length of client input that a message quotes, in characters."""
_MAX_FAULTS = 100
"""With more faults than this, the message gives only their number: finding the first would take long."""

_MESSAGES = "/v1/messages"
"""Route of Anthropic's API; others follow below it."""
_MESSAGES_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
}
"""Types of errors in Anthropic's API, by status; of others: see ApiError.messages_body."""

logger = logging.getLogger(__name__)


class ApiError(Exception):
    """Error that is answered with `status` and a body."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        code: str = "invalid_value",
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    def renamed(self, names: Mapping[str, str]) -> ApiError:
        """Return the same error with other names of fields. Names that are plain words too count in the message only
        where it begins with them."""
        written = "|".join(rf"\b{name}\b" if "_" in name else rf"^{name}(?=[:.])" for name in names)
        message = re.sub(written, lambda found: names[found[0]], self.message) if names else self.message
        param = names.get(self.param or "", self.param)
        return ApiError(message, status=self.status, code=self.code, param=param, headers=self.headers)

    def body(self) -> dict[str, dict[str, str | None]]:
        return {
            "error": {
                "message": printable(self.message, MAX_MESSAGE),
                "type": "invalid_request_error" if self.status < 500 else "server_error",
                "param": self.param,
                "code": self.code,
            }
        }

    def messages_body(self) -> dict[str, Any]:
        """Return the body in the shape of Anthropic's API, which knows statuses by type and codes as details."""
        other = "overloaded_error" if "Retry-After" in self.headers else "api_error"
        kind = _MESSAGES_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else other)
        message = printable(self.message, MAX_MESSAGE)
        return {"type": "error", "error": {"type": kind, "message": message, "details": {"error_code": self.code}}}

    def response(self, path: str) -> Response:
        """Create the answer to a request for `path`."""
        of_messages = path == _MESSAGES or path.startswith(f"{_MESSAGES}/")
        body = msgspec.json.encode(self.messages_body() if of_messages else self.body())
        return Response(body, self.status, self.headers, media_type="application/json")


def unavailable(message: str, code: str, retry_after_s: int = 1) -> ApiError:
    """Create a 503 error that tells the client to retry after `retry_after_s`."""
    return ApiError(message, status=503, code=code, headers={"Retry-After": str(retry_after_s)})


def draining() -> ApiError:
    return unavailable("the server is shutting down", "draining")


def aborted() -> ApiError:
    """Create the error of a request that the server ends, on routes that have no other word for it."""
    return unavailable("the server ended the request: it is shutting down, or all requests were aborted", "aborted")


def engine_dead(reason: str) -> ApiError:
    return ApiError(f"the engine is gone: {reason}", status=503, code="engine_dead")


def engine_restarting(reason: str) -> ApiError:
    return unavailable(f"the engine is gone, and is being started again: {reason}", "engine_restarting")


def as_api_error(error: Exception) -> ApiError:
    """Convert `error` to an ApiError. An unexpected one is logged, and its text is not sent."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineDead):
        reason = str(error).splitlines()[0] if str(error) else "unknown reason"
        return engine_restarting(reason) if isinstance(error, EngineDown) else engine_dead(reason)
    logger.error("a request failed", exc_info=error)
    return ApiError("internal error", status=500, code="internal_error")


def from_validation(error: ValidationError) -> ApiError:
    """Describe the first fault of a body that does not match its schema."""
    if error.error_count() > _MAX_FAULTS:
        return ApiError(f"the body has {error.error_count()} faults")
    faults = error.errors(include_url=False, include_input=False, include_context=False)
    fault = faults[0]
    if fault["type"] == "json_invalid":
        return ApiError(fault["msg"], code="invalid_json")
    param = printable(".".join(str(part) for part in fault["loc"] if part != "[key]"), _MAX_NAME)
    message, code = fault["msg"], "invalid_value"
    if fault["type"] == "extra_forbidden":
        message, code = "unknown field", "unknown_field"
    elif fault["type"] == "missing":
        message, code = "this field is required", "missing_field"
    elif fault["type"] == "not_served":
        code = "not_served"
    more = f" ({len(faults) - 1} more)" if len(faults) > 1 else ""
    return ApiError(f"{param}: {message}{more}" if param else message, code=code, param=param or None)


def printable(text: str, limit: int) -> str:
    """Cut `text` to `limit` characters and escape control characters, so that it fits on one line."""
    cut = text if len(text) <= limit else text[: limit - 1] + "…"
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in cut)


def add_handlers(app: FastAPI) -> None:
    async def api_error(request: Request, error: Exception) -> Response:
        return as_api_error(error).response(request.scope["path"])

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        where = printable(f"{request.method} {request.url.path}", _MAX_NAME)
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
        return ApiError(
            f"{where}: {error.detail}", status=error.status_code, code=code, headers=error.headers
        ).response(request.scope["path"])

    async def gone(_: Request, __: Exception) -> Response:
        return Response(status_code=499)  # the client is gone

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(EngineDead, api_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(ClientDisconnect, gone)


class ErrorMiddleware:
    """ASGI middleware that answers unexpected errors with 500, and requests cancelled at shutdown with 503.

    Once the answer has begun, the connection is closed instead.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def watched(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
            return
        except asyncio.CancelledError:  # the server ends and cancels this request's task
            answer = draining()
        except Exception as error:
            answer = as_api_error(error)
        if scope["type"] == "http" and not begun:
            await answer.response(scope["path"])(scope, receive, send)
