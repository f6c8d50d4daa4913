"""POST /tokenize and /detokenize."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from models.tokenizer import Tokenizer
from server.bodies.fields import read
from server.bodies.schemas import DetokenizeRequest, TokenizeRequest
from server.chat.chat_run import render
from server.service import Service, run_by_length

router = APIRouter()


@router.post("/tokenize")
async def tokenize(request: Request) -> dict[str, Any]:
    service: Service = request.app.state.service
    body = await read(request, TokenizeRequest)
    body.check()
    service.check_model(body.model)
    ready = service.loaded().ready
    if body.prompt is not None:
        special = True if body.add_special_tokens is None else body.add_special_tokens
        (tokens,) = await service.encode([body.prompt], special)
    else:
        rendered = await render(service, body, body.messages or [], body.offered())
        tokens = await service.encode_chat(rendered, bool(body.add_special_tokens))
    strings = None
    if body.return_token_strs:
        strings = await run_by_length(len(tokens), _strings, service.tokenizer, tokens)
    return {
        "count": len(tokens),
        "max_model_len": ready.max_model_len,
        "tokens": tokens,
        "token_strs": strings,
    }


@router.post("/detokenize")
async def detokenize(request: Request) -> dict[str, Any]:
    service: Service = request.app.state.service
    body = await read(request, DetokenizeRequest)
    service.check_model(body.model)
    decode = service.tokenizer.decode
    return {"prompt": await run_by_length(len(body.tokens), decode, body.tokens, skip_special_tokens=False)}


def _strings(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    return [tokenizer.token_bytes(token).decode(errors="replace") for token in tokens]
