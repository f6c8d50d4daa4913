"""GET /openapi.json: requests and answers of all routes, generated from the models that parse requests."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from server.bodies.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

_BODIES: dict[str, type[BaseModel]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
_STREAMING = ("/v1/completions", "/v1/chat/completions")
_GET_ROUTES = {
    "/v1/models": "List the models served.",
    "/v1/models/{model_id}": "Describe one model.",
    "/health": "Report whether the engine and all ranks are alive.",
    "/ready": "Report whether the server accepts requests.",
    "/metrics": "Metrics in Prometheus text format.",
    "/version": "Version and commit.",
    "/load": "Numbers of requests and of KV pages in use.",
    "/": "Dashboard and playground.",
}
_TEXTS = {"/metrics": "text/plain", "/": "text/html"}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string", "maxLength": 500},
                "type": {"enum": ["invalid_request_error", "server_error"]},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}


def _counts(*names: str, **others: dict[str, Any]) -> dict[str, Any]:
    """Schema of an object of these numbers of tokens, and of `others`; it has all of them."""
    counts = {name: {"type": "integer", "minimum": 0} for name in names}
    return {"type": "object", "required": [*names, *others], "properties": {**counts, **others}}


_USAGE = _counts(
    "prompt_tokens",
    "completion_tokens",
    "total_tokens",
    prompt_tokens_details=_counts("cached_tokens"),
    completion_tokens_details=_counts("accepted_prediction_tokens", "rejected_prediction_tokens"),
)
_COMPLETION = {
    "type": "object",
    "required": ["id", "object", "created", "model", "choices", "usage"],
    "properties": {"usage": {"$ref": "#/components/schemas/Usage"}},
}
_STATUSES = {
    400: "Invalid value; `param` names it.",
    401: "No valid API key.",
    404: "Unknown model or route.",
    405: "Method not allowed on this route.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    503: "Loading, full, draining, or the engine has died; with Retry-After where a retry can succeed.",
}

router = APIRouter()


@cache
def document(version: str) -> dict[str, Any]:
    """Build the OpenAPI 3.1 document."""
    read: Literal["validation"] = "validation"
    models = [(model, read) for model in _BODIES.values()]
    _, schemas = models_json_schema(models, ref_template="#/components/schemas/{model}")
    paths: dict[str, Any] = {}
    for path, model in _BODIES.items():
        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}}
        answer: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
        if path in _STREAMING:
            answer["application/json"] = {"schema": {"$ref": "#/components/schemas/Completion"}}
            answer["text/event-stream"] = {"schema": {}}
        paths[path] = {
            "post": _operation((model.__doc__ or "").strip(), answer, {"required": True, "content": content})
        }
    paths["/reset_prefix_cache"] = {"post": _operation("Empty the prefix cache.", {}, None)}
    for path, about in _GET_ROUTES.items():
        operation = _operation(about, {_TEXTS.get(path, "application/json"): {"schema": {}}}, None)
        if "{" in path:
            parameter = {"name": "model_id", "in": "path", "required": True, "schema": {"type": "string"}}
            operation["parameters"] = [parameter]
        paths[path] = {"get": operation}
    return {
        "openapi": "3.1.0",
        "info": {"title": "magicdec", "version": version},
        "paths": paths,
        "components": {
            "schemas": {**schemas.get("$defs", {}), "Completion": _COMPLETION, "Usage": _USAGE, "Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }


def _operation(about: str, answer: dict[str, Any], body: dict[str, Any] | None) -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    statuses = {str(status): {"description": text, "content": error} for status, text in _STATUSES.items()}
    found: dict[str, Any] = {
        "summary": about,
        "responses": {"200": {"description": "OK", "content": answer}, **statuses},
    }
    return found if body is None else found | {"requestBody": body}


@router.get("/openapi.json")
async def openapi(request: Request) -> dict[str, Any]:
    return document(request.app.state.service.build["version"])
