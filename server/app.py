"""The HTTP application."""

from __future__ import annotations

from fastapi import FastAPI

from server import chat, completions, info, tokens
from server.errors import add_handlers
from server.limits import BodyLimit
from server.service import Service


def create_app(service: Service) -> FastAPI:
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service = service
    add_handlers(app)
    app.add_middleware(BodyLimit, max_bytes=int(service.config.server.max_body_mb * 2**20))
    for routes in (completions, chat, tokens, info):
        app.include_router(routes.router)
    return app
