"""POST /v1/responses, and the responses that it has kept."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Literal, TypeVar

from fastapi import APIRouter, Request, Response
from pydantic import ValidationError

from engine.messages import FINISH_ABORT, FINISH_LENGTH
from server.bodies.chat_body import ToolChoice
from server.bodies.fields import read
from server.bodies.response_items import listed
from server.bodies.responses_body import NAMES, ItemsQuery, ResponsesRequest, RetrievalQuery
from server.bodies.strict import Body
from server.chat.chat_run import ChatPiece, ChatRun
from server.chat.response_output import ContentTokens, Event, ResponseOutput, new_item_id
from server.chat.response_store import StoredResponse
from server.errors import ApiError, aborted, as_api_error, from_validation, printable
from server.keys import owner_of
from server.observe.speculation_report import SpeculationReports
from server.routes.chat import token_logprobs
from server.routes.completions import clamped
from server.routes.stream import respond, typed_event
from server.service import Service

Model = TypeVar("Model", bound=Body)

router = APIRouter()


@router.post("/v1/responses")
async def create(request: Request) -> Response:
    service: Service = request.app.state.service
    body = await read(request, ResponsesRequest)
    body.check()
    service.check_model(body.model)
    service.engine()
    owner = owner_of(request.scope)
    history = _history(service, body, owner)
    try:
        run = await ChatRun.prepare(service, body.for_chat(history))
    except ApiError as error:
        raise error.renamed(NAMES) from None
    answer = _Answer(body, run, history, owner)
    return await respond(request, answer, bool(body.stream), encode=typed_event, done=False)


@router.get("/v1/responses/{response_id}")
async def retrieve(request: Request, response_id: str) -> dict[str, Any]:
    _query(request, RetrievalQuery)
    return _kept(request, response_id).response


@router.delete("/v1/responses/{response_id}")
async def delete(request: Request, response_id: str) -> dict[str, Any]:
    service: Service = request.app.state.service
    if not service.responses.delete(response_id, owner_of(request.scope)):
        raise _not_found(response_id)
    return {"id": response_id, "object": "response", "deleted": True}


@router.get("/v1/responses/{response_id}/input_items")
async def input_items(request: Request, response_id: str) -> dict[str, Any]:
    """List the items that the response answers, those of earlier turns too."""
    query, items = _query(request, ItemsQuery), list(_kept(request, response_id).input)
    if query.order == "desc":
        items.reverse()
    if query.after is not None:
        places = [place for place, item in enumerate(items) if item["id"] == query.after]
        if not places:
            raise ApiError("after: the response has no such item", param="after")
        items = items[places[-1] + 1 :]  # clients may send items with the same id
    page = items[: query.limit]
    ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {"first_id": None, "last_id": None}
    return {"object": "list", "data": page, **ends, "has_more": len(items) > len(page)}


def _query(request: Request, model: type[Model]) -> Model:
    try:
        return model.model_validate(dict(request.query_params))
    except ValidationError as error:
        raise from_validation(error) from None


def _history(service: Service, body: ResponsesRequest, owner: bytes) -> list[dict[str, Any]]:
    """Return the items of the conversation that the request continues. Raises ApiError."""
    if body.store and not service.responses.is_on:
        raise ApiError("store: this server keeps no responses", code="not_served", param="store")
    if body.previous_response_id is None:
        return []
    previous = service.responses.get(body.previous_response_id, owner)
    if previous is None:
        id = printable(body.previous_response_id, 64)
        raise ApiError(
            f"previous_response_id: {id} was not found: it does not exist, or is no longer kept",
            code="previous_response_not_found",
            param="previous_response_id",
        )
    return previous.conversation


def _kept(request: Request, id: str) -> StoredResponse:
    service: Service = request.app.state.service
    found = service.responses.get(id, owner_of(request.scope))
    if found is None:
        raise _not_found(id)
    return found


def _not_found(id: str) -> ApiError:
    reason = f"response {printable(id, 64)} was not found: it does not exist, or is no longer kept"
    return ApiError(reason, status=404, code="response_not_found")


class _Answer:
    """The answer to one request in this route's format."""

    def __init__(self, body: ResponsesRequest, run: ChatRun, history: list[dict[str, Any]], owner: bytes) -> None:
        """history: items of earlier turns. owner: of the request."""
        self.id = f"resp_{uuid.uuid4().hex}"  # the server's own: whoever knows it can read the response
        self.generation = run.generation
        self._created = int(time.time())
        self._body, self._run, self._history, self._owner = body, run, history, owner
        self._output = ResponseOutput()
        self._content = ContentTokens()
        self._reports = SpeculationReports()
        self._sent = 0

    async def whole(self) -> dict[str, Any]:
        async with aclosing(self._events()) as events:
            async for event in events:
                last = event
        response: dict[str, Any] = last["response"]
        return response

    async def events(self) -> AsyncGenerator[Event, None]:
        async with aclosing(self._events()) as events:
            try:
                async for event in events:
                    yield self._numbered(event)
            except Exception as error:
                if not self._sent:
                    raise
                yield self._numbered({"type": "response.failed", "response": self._failed(as_api_error(error))})

    def _numbered(self, event: Event) -> Event:
        self._sent += 1
        return {**event, "sequence_number": self._sent - 1}

    async def _events(self) -> AsyncGenerator[Event, None]:
        begun, reason = False, None
        async with aclosing(self._run.pieces()) as pieces:
            async for piece in pieces:
                if not begun:
                    begun = True
                    yield {"type": "response.created", "response": self._response("in_progress")}
                    yield {"type": "response.in_progress", "response": self._response("in_progress")}
                for event in self._output.add(piece.delta, self._logprobs(piece)):
                    yield event
                self._reports.add(piece.index, piece.raw.report)
                reason = piece.finish_reason
        if reason == FINISH_ABORT:
            raise aborted()
        status: Literal["completed", "incomplete"] = "incomplete" if reason == FINISH_LENGTH else "completed"
        for event in self._output.finish(status):
            yield event
        yield {"type": f"response.{status}", "response": self._finished(status)}

    def _logprobs(self, piece: ChatPiece) -> list[list[dict[str, Any]]]:
        if not self._body.wants_logprobs:
            return []
        tokens = token_logprobs(self._run.service.tokenizer, piece.raw.delta)
        return self._content.take(piece, tokens, begins=not self._output.in_message)

    def _finished(self, status: Literal["completed", "incomplete"]) -> dict[str, Any]:
        """Return the whole response, which is kept if the client does not object."""
        details = {"reason": "max_output_tokens"} if status == "incomplete" else None
        done = {"completed_at": int(time.time())} if status == "completed" else {}
        response = {
            **self._response(status),
            **done,
            "incomplete_details": details,
            "usage": self._usage(),
            **self._reports.fields(0),
        }
        if response["store"]:
            items = [*self._history, *(listed(item, new_item_id) for item in self._body.input)]
            response["store"] = self._run.service.responses.put(StoredResponse(self._owner, response, items))
        return response

    def _failed(self, error: ApiError) -> dict[str, Any]:
        code = "server_error" if error.status >= 500 else "invalid_prompt"
        said = error.body()["error"]["message"]
        return {**self._response("failed"), "error": {"code": code, "message": said}, "usage": self._usage()}

    def _usage(self) -> dict[str, Any]:
        usage = self.generation.usage
        return {
            "input_tokens": usage.prompt_tokens,
            # No tokens are written to a cache that has to be paid for.
            "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {
                "reasoning_tokens": usage.reasoning_tokens,
                "accepted_prediction_tokens": usage.accepted,
                "rejected_prediction_tokens": usage.rejected,
            },
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }

    def _response(self, status: str) -> dict[str, Any]:
        body, params = self._body, self.generation.choices[0].params
        text = {} if body.text is None else body.text.model_dump(by_alias=True, exclude_none=True)
        effort = body.reasoning.effort if body.reasoning else None
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": body.max_tool_calls,
            "metadata": body.metadata or {},
            "model": self._run.service.model_id,
            "output": list(self._output.items),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "prompt_cache_key": body.prompt_cache_key,
            "reasoning": {"effort": effort, "summary": None},
            "safety_identifier": body.safety_identifier,
            "service_tier": "default",
            "store": body.store is not False and self._run.service.responses.is_on,
            "temperature": params.temperature,
            "text": {"format": {"type": "text"}, **text},
            "tool_choice": _chosen(body.tool_choice),
            "tools": [tool.shown() for tool in body.tools or ()],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": params.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": body.user,
            **clamped(self.generation, body.max_output_tokens),
        }


def _chosen(choice: ToolChoice | None) -> Any:
    """Return `tool_choice` as a client writes it."""
    if choice is None or choice.names is None:
        return "auto" if choice is None else choice.mode
    tools = [{"type": "function", "name": name} for name in choice.names]
    if choice.once:
        return tools[0]
    return {"type": "allowed_tools", "mode": choice.mode, "tools": tools}
