"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's Messages API over chats."""

from __future__ import annotations

import uuid
from collections import defaultdict
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response

from engine.messages import FINISH_ABORT, FINISH_LENGTH
from server.bodies.chat_body import ChatRequest
from server.bodies.fields import read
from server.bodies.messages_body import NAMES, CountTokensRequest, MessagesRequest
from server.chat.answer_parser import AnswerDelta
from server.chat.chat_run import FINISH_CALLS, ChatPiece, ChatRun, render
from server.errors import ApiError, aborted, as_api_error
from server.request_ids import given_request_id
from server.routes.stream import respond, typed_event
from server.service import Service
from server.text.tools.tool_messages import parse_object

router = APIRouter()


@router.post("/v1/messages")
async def create(request: Request) -> Response:
    service: Service = request.app.state.service
    body = await read(request, MessagesRequest)
    service.check_model(body.model)
    service.engine()
    try:
        run = await ChatRun.prepare(service, _chat(service, body))
    except ApiError as error:
        raise error.renamed(NAMES) from None
    answer = _Answer(body, run, given_request_id(request.scope))
    return await respond(request, answer, bool(body.stream), encode=typed_event, done=False)


@router.post("/v1/messages/count_tokens")
async def count_tokens(request: Request) -> dict[str, int]:
    service: Service = request.app.state.service
    body = await read(request, CountTokensRequest)
    service.check_model(body.model)
    service.loaded()
    try:
        chat = _chat(service, body)
        use = chat.tool_use()
        told = use.offered if use.mode != "none" else ()
        rendered = await render(service, chat, chat.messages, told, chat.reasoning_effort)
        return {"input_tokens": len(await service.encode_chat(rendered, False))}
    except ApiError as error:
        raise error.renamed(NAMES) from None


def _chat(service: Service, body: CountTokensRequest) -> ChatRequest:
    return body.chat(thinks=service.thinking.thinks, knows=service.template.knows)


class _Answer:
    """A message in this API's format."""

    def __init__(self, body: MessagesRequest, run: ChatRun, given_id: str | None) -> None:
        """given_id: the request's X-Request-Id."""
        self.id = f"msg_{given_id or uuid.uuid4().hex}"
        self._body, self._run = body, run
        self.generation = run.generation

    async def whole(self) -> dict[str, Any]:
        message: dict[str, Any] = {}
        content: list[dict[str, Any]] = []
        inputs: defaultdict[int, str] = defaultdict(str)  # of calls, by block
        async with aclosing(self._events()) as events:
            async for event in events:
                match event["type"]:
                    case "message_start":
                        message = event["message"] | {"content": content}
                    case "content_block_start":
                        content.append(event["content_block"])
                    case "content_block_delta":
                        for name, text in event["delta"].items():
                            if name == "partial_json":
                                inputs[event["index"]] += text
                            elif name != "type":
                                content[-1][name] += text
                    case "message_delta":
                        message |= event["delta"] | {"usage": event["usage"]}
        for index, text in inputs.items():
            content[index]["input"] = parse_object(text) or {}  # a call that was cut short has none
        return message

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        begun = False
        try:
            async with aclosing(self._events()) as events:
                async for event in events:
                    begun = True
                    yield event
        except Exception as error:
            if not begun:
                raise
            yield as_api_error(error).messages_body()

    async def _events(self) -> AsyncGenerator[dict[str, Any], None]:
        blocks = _Blocks(self._body.shows_thinking, self.id)
        last: ChatPiece | None = None
        async with aclosing(self._run.pieces()) as pieces:
            async for piece in pieces:
                if last is None:
                    yield {"type": "message_start", "message": self._start()}
                    yield {"type": "ping"}
                last = piece
                if piece.finish_reason == FINISH_ABORT:
                    raise aborted()
                for event in blocks.add(piece.delta):
                    yield event
        for event in blocks.end():
            yield event
        assert last is not None
        yield {"type": "message_delta", "delta": _stop(last), "usage": self._usage()}
        yield {"type": "message_stop"}

    def _start(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self._run.service.model_id,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self._usage(),
        }

    def _usage(self) -> dict[str, Any]:
        """Return counts of tokens; input_tokens are those that the prefix cache did not hold."""
        usage = self.generation.usage
        return {
            "input_tokens": usage.prompt_tokens - usage.cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": usage.cached_tokens,
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
        }


class _Blocks:
    """Content blocks of one message, as events."""

    def __init__(self, shows_thinking: bool, signature: str) -> None:
        """signature: of thinking. Clients send back thinking that has one, and do not look into it; nor do we."""
        self._shows_thinking, self._signature = shows_thinking, signature
        self._open = ""  # type of the block that grows
        self._index = -1

    def add(self, delta: AnswerDelta) -> Iterator[dict[str, Any]]:
        """Yield the events of more of the answer."""
        if delta.thinking and self._shows_thinking:
            if self._open != "thinking":
                yield from self._begin({"type": "thinking", "thinking": "", "signature": ""})
            yield self._delta({"type": "thinking_delta", "thinking": delta.thinking})
        for part in delta.parts:
            if isinstance(part, str):
                if self._open != "text":
                    yield from self._begin({"type": "text", "text": ""})
                yield self._delta({"type": "text_delta", "text": part})
                continue
            if part.name is not None:
                yield from self._begin({"type": "tool_use", "id": part.id, "name": part.name, "input": {}})
            if part.arguments:
                yield self._delta({"type": "input_json_delta", "partial_json": part.arguments})

    def end(self) -> Iterator[dict[str, Any]]:
        """Yield the events that end the block that grows, if there is one."""
        if self._open == "thinking":
            yield self._delta({"type": "signature_delta", "signature": self._signature})
        if self._open:
            yield {"type": "content_block_stop", "index": self._index}
        self._open = ""

    def _begin(self, block: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield from self.end()
        self._open = block["type"]
        self._index += 1
        yield {"type": "content_block_start", "index": self._index, "content_block": block}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}


def _stop(last: ChatPiece) -> dict[str, Any]:
    """Return why the message ends."""
    sequence = last.raw.delta.stop_reason
    if isinstance(sequence, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": sequence}
    reasons = {FINISH_LENGTH: "max_tokens", FINISH_CALLS: "tool_use"}
    return {"stop_reason": reasons.get(last.finish_reason or "", "end_turn"), "stop_sequence": None}
