"""The HTTP application."""

from __future__ import annotations

from fastapi import FastAPI

from server import chat, completions, info, tokens
from server.errors import LastResort, add_handlers
from server.limits import BodyLimit
from server.service import Service


def create_app(service: Service) -> FastAPI:
    app = FastAPI(
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        # Off, and said so, lest environment variables switch it on.
        telemetry={"auto_configure": False, "tracing": False, "metrics": False, "logs": False},
    )
    app.state.service = service
    add_handlers(app)
    app.add_middleware(BodyLimit, max_bytes=int(service.config.server.max_body_mb * 2**20))
    app.add_middleware(LastResort)  # outermost
    for routes in (completions, chat, tokens, info):
        app.include_router(routes.router)
    return app
