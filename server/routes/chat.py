"""POST /v1/chat/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request, Response

from engine.messages import TokenLogprobs
from engine.text import Delta
from models.tokenizer import Tokenizer
from server.bodies.chat_body import ChatRequest
from server.bodies.fields import read
from server.chat.answer_parser import AnswerDelta, CallDelta
from server.chat.chat_run import ChatPiece, ChatRun
from server.errors import ApiError
from server.observe.speculation_report import SpeculationReports
from server.request_ids import given_request_id
from server.routes.completions import clamped, finite, told_of_prompt
from server.routes.stream import respond
from server.service import Service

router = APIRouter()


@router.post("/v1/chat/completions")
async def create(request: Request) -> Response:
    service: Service = request.app.state.service
    body = await read(request, ChatRequest)
    body.check()
    service.check_model(body.model)
    service.engine()
    try:
        run = await ChatRun.prepare(service, body)
    except ApiError as error:
        newer = {} if body.max_completion_tokens is None else {"max_tokens": "max_completion_tokens"}
        raise error.renamed({"prompt": "messages", **newer}) from None
    return await respond(request, _Answer(body, run, given_request_id(request.scope)), bool(body.stream))


@dataclass(slots=True)
class _Message:
    """A choice's answer so far. calls: in the route's format."""

    thinking: str = ""
    content: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    last: ChatPiece | None = None

    def add(self, delta: AnswerDelta) -> None:
        self.thinking += delta.thinking
        self.content += delta.content
        for call in delta.calls:
            if call.name is not None:
                self.calls.append(_call(call))
            else:
                self.calls[call.index]["function"]["arguments"] += call.arguments


class _Answer:
    """Choices of one request in this route's format."""

    def __init__(self, body: ChatRequest, run: ChatRun, given_id: str | None) -> None:
        """given_id: the request's X-Request-Id."""
        self.id = f"chatcmpl-{body.request_id or given_id or uuid.uuid4().hex}"
        self._created = int(time.time())
        self._body, self._run = body, run
        self._asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        self._service, self.generation = run.service, run.generation

    async def whole(self) -> dict[str, Any]:
        messages = [_Message() for _ in self.generation.choices]
        reports = SpeculationReports()
        prompt: dict[str, Any] = {}
        async with aclosing(self._run.pieces()) as pieces:
            async for piece in pieces:
                message = messages[piece.index]
                message.add(piece.delta)
                message.logprobs += self._logprobs(piece)
                message.tokens += piece.raw.delta.tokens
                message.last = piece
                reports.add(piece.index, piece.raw.report)
                if (count := self._body.prompt_logprobs) is not None and piece.raw.prompt is not None:
                    prompt = await told_of_prompt(self._service.tokenizer, piece.raw.prompt, count)
        choices = [
            {
                "index": index,
                "message": self._message(message),
                "logprobs": {"content": message.logprobs, "refusal": None} if self._body.logprobs else None,
                "finish_reason": message.last.finish_reason if message.last else None,
                "stop_reason": message.last.raw.delta.stop_reason if message.last else None,
                **reports.fields(index),
                **self._ids(message.tokens),
            }
            for index, message in enumerate(messages)
        ]
        usage = {"usage": self.generation.usage.as_dict()}
        return self._object("chat.completion", choices) | usage | prompt | self._prompt_ids()

    def _ids(self, tokens: list[int]) -> dict[str, Any]:
        return {"token_ids": tokens} if self._body.return_token_ids else {}

    def _prompt_ids(self) -> dict[str, Any]:
        return {"prompt_token_ids": self.generation.choices[0].prompt} if self._body.return_token_ids else {}

    def _message(self, message: _Message) -> dict[str, Any]:
        content = message.content if message.content or not message.calls else None
        calls = {"tool_calls": message.calls} if message.calls else {}
        thinking = self._thinking(message.thinking) if message.thinking else {}
        return {"role": "assistant", "content": content, "refusal": None, **thinking, **calls}

    def _thinking(self, text: str) -> dict[str, Any]:
        """Return the fields of thinking, which clients know by two names."""
        return {} if self._body.include_reasoning is False else {"reasoning_content": text, "reasoning": text}

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        usage = self.generation.usage
        silent = {choice.index for choice in self.generation.choices}
        async with aclosing(self._run.pieces()) as pieces:
            async for piece in pieces:
                if piece.index in silent:
                    silent.remove(piece.index)
                    head = self._chunk(_delta(piece.index, {"role": "assistant", "content": ""}))
                    yield head | self._prompt_ids()
                logprobs, delta, ids = (
                    self._logprobs(piece),
                    self._delta(piece.delta),
                    self._ids(piece.raw.delta.tokens),
                )
                if not (delta or logprobs or piece.raw.report or piece.finish_reason or ids.get("token_ids")):
                    continue  # the whole piece is held back
                choice = _delta(piece.index, delta) | ids
                choice["logprobs"] = {"content": logprobs, "refusal": None} if self._body.logprobs else None
                choice["finish_reason"] = piece.finish_reason
                choice["stop_reason"] = piece.raw.delta.stop_reason
                if piece.raw.report is not None:
                    choice["speculation"] = piece.raw.report
                yield self._chunk(choice)
        if self._body.usage_at_end:
            yield self._object("chat.completion.chunk", []) | {"usage": usage.as_dict()}

    def _delta(self, delta: AnswerDelta) -> dict[str, Any]:
        thinking = self._thinking(delta.thinking) if delta.thinking else {}
        content = {"content": delta.content} if delta.content else {}
        calls = {"tool_calls": [_call_delta(call) for call in delta.calls]} if delta.calls else {}
        return {**thinking, **content, **calls}

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        chunk = self._object("chat.completion.chunk", [choice])
        if self._body.usage_always:
            chunk["usage"] = self.generation.usage.as_dict()
        elif self._body.usage_at_end:
            chunk["usage"] = None
        return chunk

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self._created,
            "model": self._service.model_id,
            "choices": choices,
            **clamped(self.generation, self._asked),
        }

    def _logprobs(self, piece: ChatPiece) -> list[dict[str, Any]]:
        return token_logprobs(self._service.tokenizer, piece.raw.delta)


def token_logprobs(tokenizer: Tokenizer, delta: Delta) -> list[dict[str, Any]]:
    """Describe all tokens with log-probabilities, those of thinking and calls too."""
    return [
        _token(tokenizer, token, entry.logprob) | {"top_logprobs": _top(tokenizer, entry)}
        for token, entry in zip(delta.tokens, delta.logprobs or (), strict=delta.logprobs is not None)
    ]


def _delta(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _call(call: CallDelta) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _call_delta(call: CallDelta) -> dict[str, Any]:
    whole = {"function": {"arguments": call.arguments}} if call.name is None else _call(call)
    return {"index": call.index, **whole}


def _top(tokenizer: Tokenizer, entry: TokenLogprobs) -> list[dict[str, Any]]:
    pairs = zip(entry.top_ids, entry.top_logprobs, strict=True)
    return [_token(tokenizer, token, logprob) for token, logprob in pairs]


def _token(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    """Describe a token. `bytes` is exact even for part of a character, which `token` cannot represent."""
    raw = tokenizer.token_bytes(token)
    return {"token": raw.decode(errors="replace"), "logprob": finite(logprob), "bytes": list(raw)}
