"""Build a RequestOutput from a row's result."""

from __future__ import annotations

import msgspec

from engine.messages import FINISH_ABORT, PromptLogprobs, RequestOutput, TokenLogprobs
from engine.plan import DraftOrigin, RowFailure, RowResult
from engine.scheduler.request import Request


def make_output(request: Request, tokens: list[int], row: RowResult | None, origin: DraftOrigin) -> RequestOutput:
    """Build a request's output for one round.

    tokens: those that the round added to the request, which may have ended with them. row: the request's result; None
    if it sampled nothing. origin: of its drafts.
    """
    return RequestOutput(
        id=request.id,
        tokens=tokens,
        logprobs=_token_logprobs(row.logprobs, request, len(tokens)) if row else None,
        prompt_logprobs=_prompt_logprobs(request) if request.num_output == len(tokens) else None,
        drafted=row.drafted if row else 0,
        accepted=min(row.accepted, len(tokens)) if row else 0,
        from_text=origin.from_text,
        by_model=origin.by_model,
        finish_reason=request.finish_reason,
        stop_reason=request.stop_reason,
        scheduled=request.scheduled or 0.0,
        cached_tokens=request.cached_tokens,
    )


def failed_output(request: Request, failure: RowFailure) -> RequestOutput:
    """Build the last output of a request that has failed."""
    return RequestOutput(
        request.id, finish_reason=FINISH_ABORT, error=failure.reason, is_server_fault=not failure.is_request_fault
    )


def _token_logprobs(logprobs: list[TokenLogprobs] | None, request: Request, count: int) -> list[TokenLogprobs] | None:
    """Return the first `count` entries, each with as many alternatives as this request asks for."""
    num_alternatives = request.params.logprobs
    if logprobs is None or num_alternatives is None:
        return None
    return [
        TokenLogprobs(at.logprob, at.top_ids[:num_alternatives], at.top_logprobs[:num_alternatives])
        for at in logprobs[:count]
    ]


def _prompt_logprobs(request: Request) -> list[PromptLogprobs] | None:
    """Return the prompt's entries, each with as many alternatives as this request asks for."""
    num_alternatives = request.params.prompt_logprobs
    if num_alternatives is None:
        return None
    return [
        msgspec.structs.replace(
            each, top_ids=each.top_ids[:num_alternatives], top_logprobs=each.top_logprobs[:num_alternatives]
        )
        for each in request.prompt_logprobs
    ]
