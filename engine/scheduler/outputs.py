"""Build a RequestOutput from a row's result."""

from __future__ import annotations

import msgspec

from engine.messages import PromptLogprobs, RequestOutput, TokenLogprobs
from engine.plan import RowResult
from engine.scheduler.request import Request


def make_output(request: Request, tokens: list[int], row: RowResult) -> RequestOutput:
    """Build a request's output for one round.

    tokens: those that the round added to the request, which may have ended with them. row: the request's result.
    """
    return RequestOutput(
        id=request.id,
        tokens=tokens,
        logprobs=_token_logprobs(row.logprobs, request, len(tokens)),
        prompt_logprobs=_prompt_logprobs(request) if request.num_output == len(tokens) else None,
        drafted=row.drafted,
        accepted=min(row.accepted, len(tokens)),
        finish_reason=request.finish_reason,
        stop_reason=request.stop_reason,
        scheduled=request.scheduled or 0.0,
    )


def _token_logprobs(logprobs: list[TokenLogprobs] | None, request: Request, count: int) -> list[TokenLogprobs] | None:
    """Return the first `count` entries, each with as many alternatives as this request asks for."""
    most = request.params.logprobs
    if logprobs is None or most is None:
        return None
    return [TokenLogprobs(at.logprob, at.top_ids[:most], at.top_logprobs[:most]) for at in logprobs[:count]]


def _prompt_logprobs(request: Request) -> list[PromptLogprobs] | None:
    """Return the prompt's entries, each with as many alternatives as this request asks for."""
    most = request.params.prompt_logprobs
    if most is None:
        return None
    return [
        msgspec.structs.replace(each, top_ids=each.top_ids[:most], top_logprobs=each.top_logprobs[:most])
        for each in request.prompt_logprobs
    ]
