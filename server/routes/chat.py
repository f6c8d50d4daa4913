"""POST /v1/chat/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from engine.messages import TokenLogprobs
from models.tokenizer import Tokenizer
from server.bodies.fields import choice_seed, read
from server.bodies.schemas import ChatFields, ChatRequest
from server.generation import Choice, ChoiceDelta, Generation, Usage
from server.observe.speculation_report import SpeculationReports
from server.request_ids import given_request_id
from server.routes.completions import finite, prompt_logprobs
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
    answer = await _Answer.prepare(service, body, given_request_id(request.scope))
    return await respond(request, answer, bool(body.stream))


async def prompt_tokens(service: Service, chat: ChatFields, add_special_tokens: bool | None) -> list[int]:
    """Tokenize the conversation in the model's own template, which writes all special tokens. Raises ApiError."""
    messages = [message.model_dump(include={"role", "content", "name"}) for message in chat.messages]
    for message in messages:
        if message["name"] is None:
            del message["name"]
    generate = True if chat.add_generation_prompt is None else chat.add_generation_prompt
    rendered = await service.template.render_async(messages, generate)
    return await service.encode_chat(rendered, bool(add_special_tokens))


class _Answer:
    """Choices of one request in this route's format."""

    def __init__(self, service: Service, body: ChatRequest, generation: Generation, given_id: str | None) -> None:
        """given_id: the request's X-Request-Id."""
        self.id = f"chatcmpl-{body.request_id or given_id or uuid.uuid4().hex}"
        self._created = int(time.time())
        self._service = service
        self._body = body
        self.generation = generation

    @classmethod
    async def prepare(cls, service: Service, body: ChatRequest, given_id: str | None) -> _Answer:
        """Render, tokenize and check. given_id: the request's X-Request-Id. Raises ApiError."""
        service.check_count(1, body.choices)
        tokens = await prompt_tokens(service, body, body.add_special_tokens)
        asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        tokens = service.truncate(tokens, body.truncate_prompt_tokens, asked, 1)
        params = body.sampling(
            service.engine().ready,
            max_tokens=service.fit(tokens, asked, None),
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            defaults=service.generation_defaults,
            constraints=await body.constraints(service),
        )
        choices = [
            Choice(
                number,
                tokens,
                msgspec.structs.replace(params, seed=choice_seed(params.seed, number)),
                body.priority or 0,
                body.cache_salt or "",
                body.wants_report,
                first=number == 0,
                continues=False,
            )
            for number in range(body.choices)
        ]
        return cls(service, body, Generation(service, choices, Usage(len(tokens))), given_id)

    async def whole(self) -> dict[str, Any]:
        texts: list[list[str]] = [[] for _ in self.generation.choices]
        logprobs: list[list[dict[str, Any]]] = [[] for _ in texts]
        ends: list[ChoiceDelta | None] = [None] * len(texts)
        reports = SpeculationReports()
        prompt: dict[str, Any] = {}
        async with aclosing(self.generation.pieces()) as pieces:
            async for piece in pieces:
                texts[piece.index].append(piece.delta.text)
                logprobs[piece.index] += self._logprobs(piece)
                ends[piece.index] = piece
                reports.add(piece.index, piece.report)
                if piece.prompt is not None:
                    prompt = {"prompt_logprobs": prompt_logprobs(self._service.tokenizer, piece.prompt)}
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": "".join(texts[index]), "refusal": None},
                "logprobs": {"content": logprobs[index], "refusal": None} if self._body.logprobs else None,
                "finish_reason": end.delta.finish_reason if end else None,
                "stop_reason": end.delta.stop_reason if end else None,
                **reports.fields(index),
            }
            for index, end in enumerate(ends)
        ]
        return self._object("chat.completion", choices) | {"usage": self.generation.usage.as_dict()} | prompt

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        usage = self.generation.usage
        silent = {choice.index for choice in self.generation.choices}
        async with aclosing(self.generation.pieces()) as pieces:
            async for piece in pieces:
                if piece.index in silent:
                    silent.remove(piece.index)
                    yield self._chunk(_delta(piece.index, {"role": "assistant", "content": ""}))
                logprobs = self._logprobs(piece)
                if not (piece.delta.text or logprobs or piece.report or piece.delta.finish_reason):
                    continue  # the whole piece is held back
                choice = _delta(piece.index, {"content": piece.delta.text} if piece.delta.text else {})
                choice["logprobs"] = {"content": logprobs, "refusal": None} if self._body.logprobs else None
                choice["finish_reason"] = piece.delta.finish_reason
                choice["stop_reason"] = piece.delta.stop_reason
                if piece.report is not None:
                    choice["speculation"] = piece.report
                yield self._chunk(choice)
        if self._body.usage_at_end:
            yield self._object("chat.completion.chunk", []) | {"usage": usage.as_dict()}

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
        }

    def _logprobs(self, piece: ChoiceDelta) -> list[dict[str, Any]]:
        tokenizer = self._service.tokenizer
        return [
            _token(tokenizer, token, entry.logprob) | {"top_logprobs": _top(tokenizer, entry)}
            for token, entry in zip(
                piece.delta.tokens, piece.delta.logprobs or (), strict=piece.delta.logprobs is not None
            )
        ]


def _delta(index: int, delta: dict[str, str]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _top(tokenizer: Tokenizer, entry: TokenLogprobs) -> list[dict[str, Any]]:
    pairs = zip(entry.top_ids, entry.top_logprobs, strict=True)
    return [_token(tokenizer, token, logprob) for token, logprob in pairs]


def _token(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    """Describe a token. `bytes` is exact even for part of a character, which `token` cannot represent."""
    raw = tokenizer.token_bytes(token)
    return {"token": raw.decode(errors="replace"), "logprob": finite(logprob), "bytes": list(raw)}
