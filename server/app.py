"""The HTTP application."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from server import page
from server.errors import ErrorMiddleware, add_handlers
from server.keys import ApiKeys
from server.limits import BodyLimit
from server.observe.access_log import AccessLog
from server.request_ids import RequestIds
from server.routes import anthropic_messages, chat, completions, info, openapi, responses, tokens, trainers
from server.service import Service


class HeadRequests:
    """ASGI middleware that answers HEAD like GET. The HTTP server leaves out the body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        head = scope["type"] == "http" and scope["method"] == "HEAD"
        await self._app({**scope, "method": "GET"} if head else scope, receive, send)


def create_app(service: Service, keys: frozenset[str] = frozenset()) -> FastAPI:
    """Create the application. keys: API keys; empty: no key is needed."""
    app = FastAPI(
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        # Explicitly off, so that environment variables do not switch it on.
        telemetry={"auto_configure": False, "tracing": False, "metrics": False, "logs": False},
    )
    app.state.service = service
    add_handlers(app)
    settings = service.config.server
    # The middleware added last is the outermost.
    app.add_middleware(HeadRequests)
    app.add_middleware(BodyLimit, max_bytes=int(settings.max_body_mb * 2**20), timeout_s=settings.body_timeout_s)
    if keys:
        app.add_middleware(ApiKeys, keys=keys)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    app.add_middleware(ErrorMiddleware)
    app.add_middleware(RequestIds)
    app.add_middleware(AccessLog)
    for routes in (completions, chat, responses, anthropic_messages, tokens, info, trainers, page, openapi):
        app.include_router(routes.router)
    return app
