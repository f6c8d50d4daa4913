"""GET /openapi.json: requests and answers of all routes, generated from the models that parse requests."""

from __future__ import annotations

import re
from functools import cache
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from server.bodies.chat_body import ChatRequest
from server.bodies.messages_body import CountTokensRequest, MessagesRequest
from server.bodies.responses_body import ItemsQuery, ResponsesRequest
from server.bodies.schemas import (
    CompletionRequest,
    DetokenizeRequest,
    PauseRequest,
    TokenizeRequest,
    UpdateWeightsRequest,
)

_BODIES: dict[str, type[BaseModel]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/messages": MessagesRequest,
    "/v1/messages/count_tokens": CountTokensRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
    "/pause": PauseRequest,
    "/update_weights": UpdateWeightsRequest,
}
_STREAMING = {
    "/v1/completions": "Completion",
    "/v1/chat/completions": "Completion",
    "/v1/responses": "Response",
    "/v1/messages": "MessageAnswer",
}
"""Schema of the answer in one piece of each route that can stream."""
_GET_ROUTES = {
    "/v1/models": "List the models served.",
    "/v1/models/{model_id}": "Describe one model.",
    "/v1/responses/{response_id}": "Return a response that is kept.",
    "/v1/responses/{response_id}/input_items": "List the items that a response answers.",
    "/health": "Report whether the engine and all ranks are alive.",
    "/ready": "Report whether the server accepts and runs requests.",
    "/metrics": "Metrics in Prometheus text format.",
    "/version": "Version and commit.",
    "/load": "State of the engine, numbers of requests and of KV pages in use.",
    "/": "Dashboard and playground.",
}
_POST_ROUTES = {
    "/resume": "Go on after a pause.",
    "/sleep": "Free the memory of weights and KV.",
    "/wake_up": "Load the weights back.",
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
    completion_tokens_details=_counts("accepted_prediction_tokens", "rejected_prediction_tokens", "reasoning_tokens"),
)
_COMPLETION = {
    "type": "object",
    "required": ["id", "object", "created", "model", "choices", "usage"],
    "properties": {"usage": {"$ref": "#/components/schemas/Usage"}},
}
_RESPONSE = {
    "type": "object",
    "required": ["id", "object", "created_at", "status", "model", "output", "usage"],
    "properties": {
        "status": {"enum": ["completed", "incomplete"]},
        "usage": _counts(
            "input_tokens",
            "output_tokens",
            "total_tokens",
            input_tokens_details=_counts("cached_tokens"),
            output_tokens_details=_counts(
                "accepted_prediction_tokens", "rejected_prediction_tokens", "reasoning_tokens"
            ),
        ),
    },
}
_MESSAGE = {
    "type": "object",
    "required": ["id", "type", "role", "model", "content", "stop_reason", "stop_sequence", "usage"],
    "properties": {
        "type": {"const": "message"},
        "role": {"const": "assistant"},
        "content": {"type": "array", "items": {"type": "object", "required": ["type"]}},
        "stop_reason": {"enum": ["end_turn", "max_tokens", "stop_sequence", "tool_use"]},
        "stop_sequence": {"type": ["string", "null"]},
        "usage": _counts("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens", "output_tokens"),
    },
}
_MESSAGE_ERROR = {
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message", "details"],
            "properties": {
                "type": {"type": "string"},
                "message": {"type": "string", "maxLength": 500},
                "details": {"type": "object", "properties": {"error_code": {"type": "string"}}},
            },
        },
    },
}
_STATUSES = {
    400: "Invalid value; `param` names it.",
    401: "No valid API key.",
    404: "Unknown model, response or route, or a route that is not enabled.",
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
            answer["application/json"] = {"schema": {"$ref": f"#/components/schemas/{_STREAMING[path]}"}}
            answer["text/event-stream"] = {"schema": {}}
        error = "MessageError" if path.startswith("/v1/messages") else "Error"
        body = {"required": True, "content": content}
        paths[path] = {"post": _operation((model.__doc__ or "").strip(), answer, body, error)}
    for path, about in _POST_ROUTES.items():
        paths[path] = {"post": _operation(about, {"application/json": {"schema": {"type": "object"}}}, None)}
    paths["/reset_prefix_cache"] = {"post": _operation("Empty the prefix cache.", {}, None)}
    for path, about in _GET_ROUTES.items():
        operation = _operation(about, {_TEXTS.get(path, "application/json"): {"schema": {}}}, None)
        paths[path] = {"get": operation, **_parameters(path)}
    paths["/v1/responses/{response_id}"]["delete"] = _operation("Forget a response.", {"application/json": {}}, None)
    query = ItemsQuery.model_json_schema()["properties"].items()
    paths["/v1/responses/{response_id}/input_items"]["get"]["parameters"] = [
        {"name": name, "in": "query", "schema": schema} for name, schema in query if name != "include"
    ]
    return {
        "openapi": "3.1.0",
        "info": {"title": "magicdec", "version": version},
        "paths": paths,
        "components": {
            "schemas": {
                **schemas.get("$defs", {}),
                "Completion": _COMPLETION,
                "Response": _RESPONSE,
                "MessageAnswer": _MESSAGE,
                "Usage": _USAGE,
                "Error": _ERROR,
                "MessageError": _MESSAGE_ERROR,
            },
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
        "security": [{"key": []}, {"header": []}, {}],
    }


def _parameters(path: str) -> dict[str, Any]:
    """Describe the parameters in a path."""
    names = re.findall(r"{(\w+)}", path)
    found = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]
    return {"parameters": found} if found else {}


def _operation(
    about: str, answer: dict[str, Any], body: dict[str, Any] | None, error_name: str = "Error"
) -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": f"#/components/schemas/{error_name}"}}}
    statuses = {str(status): {"description": text, "content": error} for status, text in _STATUSES.items()}
    found: dict[str, Any] = {
        "summary": about,
        "responses": {"200": {"description": "OK", "content": answer}, **statuses},
    }
    return found if body is None else found | {"requestBody": body}


@router.get("/openapi.json")
async def openapi(request: Request) -> dict[str, Any]:
    return document(request.app.state.service.build["version"])
