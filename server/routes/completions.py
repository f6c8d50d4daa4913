"""POST /v1/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from engine.messages import PromptLogprobs, TokenLogprobs
from models.tokenizer import REPLACEMENT, IncrementalDecoder, Tokenizer
from server.bodies.fields import choice_seed, read
from server.bodies.schemas import CompletionRequest
from server.errors import ApiError
from server.generation import Choice, ChoiceDelta, Generation, Usage
from server.observe.speculation_report import SpeculationReports
from server.request_ids import given_request_id
from server.routes.stream import respond
from server.service import Service, run_by_length

DEFAULT_MAX_TOKENS = 16
LOWEST_LOGPROB = -9999.0
"""Log-probability that stands for a probability of zero: JSON cannot express minus infinity."""

router = APIRouter()


@router.post("/v1/completions")
async def create(request: Request) -> Response:
    service: Service = request.app.state.service
    body = await read(request, CompletionRequest)
    body.check()
    service.check_model(body.model)
    service.engine()
    answer = await _Answer.prepare(service, body, given_request_id(request.scope))
    return await respond(request, answer, bool(body.stream))


@dataclass(frozen=True, slots=True)
class _Echo:
    """Text that a choice begins with: its prompt, if that is to be echoed."""

    text: str = ""
    offsets: Sequence[int] = ()
    """Offset in the text at which each prompt token begins."""


class _Answer:
    """Choices of one request in this route's format."""

    def __init__(
        self,
        service: Service,
        body: CompletionRequest,
        generation: Generation,
        echoes: Sequence[_Echo],
        given_id: str | None,
    ) -> None:
        """echoes: one per choice. given_id: the request's X-Request-Id."""
        self.id = f"cmpl-{body.request_id or given_id or uuid.uuid4().hex}"
        self._created = int(time.time())
        self._service = service
        self._body = body
        self.generation = generation
        self._echoes = echoes

    @classmethod
    async def prepare(cls, service: Service, body: CompletionRequest, given_id: str | None) -> _Answer:
        """Tokenize and check. given_id: the request's X-Request-Id. Raises ApiError."""
        arrival = time.monotonic()
        service.check_count(len(body.prompt), body.choices)
        special = True if body.add_special_tokens is None else body.add_special_tokens
        ready, constraints = service.engine().ready, await body.constraints(service)
        choices: list[Choice] = []
        echoes: list[_Echo] = []
        prompt_tokens = 0
        texts = [prompt for prompt in body.prompt if isinstance(prompt, str)]
        ids = [prompt for prompt in body.prompt if not isinstance(prompt, str)]
        encoded = ids or await service.encode(texts, special)  # all prompts are texts, or all are token ids
        if body.suffix:
            encoded = await _before(service, encoded, body.suffix)
        for prompt, tokens in zip(body.prompt, encoded, strict=True):
            whole = len(tokens)
            tokens = service.truncate(tokens, body.truncate_prompt_tokens, body.max_tokens, DEFAULT_MAX_TOKENS)
            max_tokens = service.fit(tokens, body.max_tokens, DEFAULT_MAX_TOKENS)
            # An echoed prompt gets log-probabilities too.
            told = max(body.logprobs, body.prompt_logprobs or 0) if body.echo and body.logprobs is not None else None
            params = body.sampling(
                ready,
                max_tokens=max_tokens,
                logprobs=body.logprobs,
                defaults=service.generation_defaults,
                constraints=constraints,
            )
            if told is not None:
                params = msgspec.structs.replace(params, prompt_logprobs=told)
            prompt_tokens += len(tokens)
            echo = _Echo()
            if body.echo and isinstance(prompt, str) and len(tokens) == whole:
                echo = await run_by_length(len(prompt), _own_text, service.tokenizer, prompt, special)
            elif body.echo:
                echo = await run_by_length(len(tokens), _decoded, service.tokenizer, tokens, params.skip_special_tokens)
            for number in range(body.choices):
                own = msgspec.structs.replace(params, seed=choice_seed(params.seed, number))
                choices.append(
                    Choice(
                        len(choices),
                        tokens,
                        own,
                        body.priority or 0,
                        body.cache_salt or "",
                        body.wants_report,
                        first=number == 0,
                        continues=True,
                    )
                )
                echoes.append(echo)
        return cls(service, body, Generation(service, choices, Usage(prompt_tokens), arrival), echoes, given_id)

    async def whole(self) -> dict[str, Any]:
        texts = [[echo.text] for echo in self._echoes]
        logprobs: list[dict[str, list[Any]] | None] = [None] * len(texts)
        ends: list[ChoiceDelta | None] = [None] * len(texts)
        reports = SpeculationReports()
        ids: list[list[int]] = [[] for _ in texts]
        prompts: dict[int, dict[str, Any]] = {}
        async with aclosing(self.generation.pieces()) as pieces:
            async for piece in pieces:
                texts[piece.index].append(piece.delta.text)
                ends[piece.index] = piece
                ids[piece.index] += piece.delta.tokens
                reports.add(piece.index, piece.report)
                if (count := self._body.prompt_logprobs) is not None and piece.prompt is not None:
                    prompts[piece.index] = await told_of_prompt(self._service.tokenizer, piece.prompt, count)
                if (more := await self._logprobs(piece)) is not None:
                    have = logprobs[piece.index]
                    logprobs[piece.index] = more if have is None else {key: have[key] + more[key] for key in more}
        choices = [
            {
                **_choice(index, "".join(texts[index]), logprobs[index], end),
                **reports.fields(index),
                **prompts.get(index, {}),
                **self._ids(index, ids[index], with_prompt=True),
            }
            for index, end in enumerate(ends)
        ]
        return self._object(choices) | {"usage": self.generation.usage.as_dict()}

    async def events(self) -> AsyncGenerator[dict[str, Any] | None, None]:
        usage = self.generation.usage
        echoes = [echo.text for echo in self._echoes]
        silent = {choice.index for choice in self.generation.choices}
        async with aclosing(self.generation.pieces()) as pieces:
            async for piece in pieces:
                if not (piece.delta.tokens or piece.delta.finish_reason):
                    yield None  # accepted
                    continue
                text, echoes[piece.index] = echoes[piece.index] + piece.delta.text, ""
                logprobs = await self._logprobs(piece)
                ids = self._ids(piece.index, piece.delta.tokens, with_prompt=piece.index in silent)
                silent.discard(piece.index)
                if not (text or logprobs or ids or piece.report or piece.delta.finish_reason):
                    continue  # the whole piece is held back
                told = {} if piece.report is None else {"speculation": piece.report}
                chunk = self._object([_choice(piece.index, text, logprobs, piece) | told | ids])
                if self._body.usage_always:
                    chunk["usage"] = usage.as_dict()
                elif self._body.usage_at_end:
                    chunk["usage"] = None
                yield chunk
        if self._body.usage_at_end:
            yield self._object([]) | {"usage": usage.as_dict()}

    def _object(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self._created,
            "model": self._service.model_id,
            "choices": choices,
            **clamped(self.generation, self._body.max_tokens),
        }

    def _ids(self, index: int, tokens: list[int], *, with_prompt: bool) -> dict[str, Any]:
        """Return the ids of a choice's new tokens, if they are asked for."""
        if not self._body.return_token_ids:
            return {}
        prompt = {"prompt_token_ids": self.generation.choices[index].prompt} if with_prompt else {}
        return {"token_ids": tokens, **prompt}

    async def _logprobs(self, piece: ChoiceDelta) -> dict[str, list[Any]] | None:
        """Return logprobs of `piece`, and of the prompt if it is echoed; offsets index into the choice's text."""
        if piece.delta.logprobs is None:
            return None
        found = self._token_logprobs(piece, piece.delta.logprobs)
        if self._body.echo and piece.prompt is not None:
            prompt = await run_by_length(len(piece.prompt), self._prompt_logprobs, piece.index, piece.prompt)
            found = {name: prompt[name] + found[name] for name in found}
        return found

    def _prompt_logprobs(self, index: int, told: list[PromptLogprobs]) -> dict[str, list[Any]]:
        """Return logprobs of the prompt of choice `index`. Its first token has none."""
        tokenizer, num_alternatives = self._service.tokenizer, self._body.logprobs or 0
        tokens = [token_text(tokenizer, token) for token in self.generation.choices[index].prompt]
        top: list[dict[str, float] | None] = [None]
        for text, each in zip(tokens[1:], told, strict=True):
            entry = TokenLogprobs(each.logprob, each.top_ids[:num_alternatives], each.top_logprobs[:num_alternatives])
            top.append(_top(tokenizer, text, entry))
        logprobs = [None, *(finite(each.logprob) for each in told)]
        return {
            "tokens": tokens,
            "token_logprobs": logprobs,
            "top_logprobs": top,
            "text_offset": list(self._echoes[index].offsets),
        }

    def _token_logprobs(self, piece: ChoiceDelta, logprobs: list[TokenLogprobs]) -> dict[str, list[Any]]:
        tokenizer = self._service.tokenizer
        tokens = [token_text(tokenizer, token) for token in piece.delta.tokens]
        echoed = len(self._echoes[piece.index].text)
        return {
            "tokens": tokens,
            "token_logprobs": [finite(entry.logprob) for entry in logprobs],
            "top_logprobs": [_top(tokenizer, token, entry) for token, entry in zip(tokens, logprobs, strict=True)],
            "text_offset": [echoed + offset for offset in piece.delta.offsets],
        }


async def _before(service: Service, prompts: Sequence[list[int]], suffix: str) -> list[list[int]]:
    """Return prompts for the text between each of `prompts` and a suffix. Raises ApiError: the model has none."""
    if service.infilling is None:
        reason = "suffix: the model's tokenizer has no tokens for a text between two others"
        raise ApiError(reason, code="not_served", param="suffix")
    (behind,) = await service.encode([suffix], False)
    return [service.infilling.prompt(prompt, behind) for prompt in prompts]


def _own_text(tokenizer: Tokenizer, prompt: str, add_special_tokens: bool) -> _Echo:
    """Echo a prompt that came as text. Tokens that the tokenizer adds to it take none of it."""
    return _Echo(prompt, tokenizer.encode_with_offsets(prompt, add_special_tokens)[1])


def _decoded(tokenizer: Tokenizer, tokens: Sequence[int], skip_special_tokens: bool) -> _Echo:
    """Echo a prompt that came as token ids, or was truncated. Special tokens that are skipped take none of the text."""
    decoder, offsets, length = IncrementalDecoder(tokenizer, skip_special_tokens), [], 0
    for token in tokens:
        piece = decoder.push(token)
        offsets.append(length + decoder.owed(token, piece))
        length += len(piece)
    return _Echo(tokenizer.decode(tokens, skip_special_tokens), offsets)


def _choice(index: int, text: str, logprobs: dict[str, list[Any]] | None, end: ChoiceDelta | None) -> dict[str, Any]:
    return {
        "index": index,
        "text": text,
        "logprobs": logprobs,
        "finish_reason": end.delta.finish_reason if end else None,
        "stop_reason": end.delta.stop_reason if end else None,
    }


def _top(tokenizer: Tokenizer, token: str, entry: TokenLogprobs) -> dict[str, float]:
    """Return the most likely tokens, and the one that was chosen."""
    top = {
        token_text(tokenizer, id): finite(logprob)
        for id, logprob in zip(entry.top_ids, entry.top_logprobs, strict=True)
    }
    return top | {token: finite(entry.logprob)}


def clamped(generation: Generation, asked: int | None) -> dict[str, int]:
    """Return what the answer says of a max_tokens that was more than there was room for."""
    most = max(choice.params.max_tokens for choice in generation.choices)
    return {} if asked is None or asked <= most else {"clamped_max_tokens": most}


async def told_of_prompt(tokenizer: Tokenizer, told: list[PromptLogprobs], count: int) -> dict[str, Any]:
    """Return the field of an answer for `prompt_logprobs: count`."""
    return {"prompt_logprobs": await run_by_length(len(told), _by_id, tokenizer, told, count)}


def _by_id(tokenizer: Tokenizer, told: list[PromptLogprobs], count: int) -> list[dict[str, Any] | None]:
    """Return, per prompt token, logprobs by token id: of it and of the `count` likeliest in its place; None for the
    first."""

    def entry(token: int, logprob: float, rank: int) -> dict[str, Any]:
        return {"logprob": finite(logprob), "rank": rank, "decoded_token": token_text(tokenizer, token)}

    found: list[dict[str, Any] | None] = [None]
    for each in told:
        top = zip(each.top_ids[:count], each.top_logprobs[:count], strict=True)
        entries = {str(id): entry(id, logprob, rank) for rank, (id, logprob) in enumerate(top, 1)}
        found.append(entries | {str(each.token): entry(each.token, each.logprob, each.rank)})
    return found


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """Return a token as text; part of a character as `bytes:\\xe2\\x82`, so that each token is distinct."""
    raw = tokenizer.token_bytes(token)
    text = raw.decode(errors="replace")
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw) if REPLACEMENT in text else text


def finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)
