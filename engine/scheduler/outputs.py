"""What a request is told of a round."""

from __future__ import annotations

import msgspec

from engine.messages import PromptLogprobs, RequestOutput, TokenLogprobs
from engine.plan import RowResult
from engine.scheduler.request import Request


def output_of(request: Request, tokens: list[int], row: RowResult) -> RequestOutput:
    """tokens: what the round, whose result `row` is, has added to the request; it may have ended with them."""
    return RequestOutput(
        id=request.id,
        tokens=tokens,
        logprobs=_asked(row.logprobs, request, len(tokens)),
        prompt_logprobs=_of_prompt(request) if request.num_output == len(tokens) else None,
        drafted=row.drafted,
        accepted=min(row.accepted, len(tokens)),
        finish_reason=request.finish_reason,
        stop_reason=request.stop_reason,
        scheduled=request.scheduled or 0.0,
    )


def _asked(logprobs: list[TokenLogprobs] | None, request: Request, count: int) -> list[TokenLogprobs] | None:
    """The first `count` reports, each with as many alternatives as this request asked for."""
    most = request.params.logprobs
    if logprobs is None or most is None:
        return None
    return [TokenLogprobs(at.logprob, at.top_ids[:most], at.top_logprobs[:most]) for at in logprobs[:count]]


def _of_prompt(request: Request) -> list[PromptLogprobs] | None:
    """With as many alternatives as were asked for."""
    most = request.params.prompt_logprobs
    if most is None:
        return None
    return [
        msgspec.structs.replace(each, top_ids=each.top_ids[:most], top_logprobs=each.top_logprobs[:most])
        for each in request.prompt_logprobs
    ]
