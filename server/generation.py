"""Run the choices of one HTTP request, each as one engine request, and convert their outputs to text."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from engine.messages import FINISH_ABORT, FINISH_LENGTH, AddRequest, PromptLogprobs, RequestOutput
from engine.params import SamplingParams
from engine.processes.supervisor import Supervisor
from engine.text import Delta, StopScope, StopString, TextStream, stop_strings
from server.errors import ApiError, unavailable
from server.observe.request_stats import RequestStats
from server.observe.speculation_report import round_report
from server.service import Service


@dataclass(frozen=True, slots=True)
class Choice:
    index: int
    prompt: list[int]
    params: SamplingParams
    priority: int
    cache_salt: str
    """Empty: none."""
    report: bool
    """Whether the answer includes a speculation report."""
    first: bool
    """Whether it is the first choice of its prompt."""
    continues: bool
    """Whether the output continues the prompt's text (a completion) or stands alone (a chat answer)."""
    shown: frozenset[int] = frozenset()
    """Special tokens that are part of the text."""
    new_scope: Callable[[], StopScope] | None = None
    """Makes the part of the text that stop strings match; None: all of it."""


@dataclass(frozen=True, slots=True)
class ChoiceDelta:
    """Output that one round added to one choice; the first one may be empty."""

    index: int
    delta: Delta
    report: dict[str, Any] | None = None
    """See server.observe.speculation_report."""
    prompt: list[PromptLogprobs] | None = None
    """Log-probabilities of the prompt; in the first piece, if requested."""
    cached_tokens: int = 0
    """Newly known number of prompt tokens that the prefix cache held; of a prompt's first choice alone."""
    rejected: int = 0
    """Drafts of this round that were not accepted."""


@dataclass(slots=True)
class Usage:
    prompt_tokens: int
    """Tokens of all prompts; each counts once, however many choices it has."""
    cached_tokens: int = 0
    """Prompt tokens that the prefix cache held when each prompt's first choice was admitted. Further choices share that
    one's KV: they do not count."""
    completion_tokens: int = 0
    accepted: int = 0
    rejected: int = 0
    reasoning_tokens: int = 0
    """Those of completion_tokens that are thinking."""

    def as_dict(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "completion_tokens_details": {
                "reasoning_tokens": self.reasoning_tokens,
                "accepted_prediction_tokens": self.accepted,
                "rejected_prediction_tokens": self.rejected,
            },
        }


@dataclass
class Generation:
    """All choices of one HTTP request; they differ in prompt and seed only.

    usage: of what `pieces` has yielded; complete when it ends. arrival: time.monotonic() when the request was there.
    """

    service: Service
    choices: Sequence[Choice]
    usage: Usage
    arrival: float
    first: float | None = None
    """time.monotonic() of the first token of any choice."""
    parent: str | None = None
    """The request's traceparent header."""

    @property
    def facts(self) -> dict[str, Any]:
        """Fields for the access log; see server.observe.access_log."""
        usage = self.usage
        return {
            "choices": len(self.choices),
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": lambda: usage.cached_tokens,
            "completion_tokens": lambda: usage.completion_tokens,
            "accepted_tokens": lambda: usage.accepted,
            "first_token_seconds": lambda: None if self.first is None else round(self.first - self.arrival, 4),
        }

    async def pieces(self) -> AsyncGenerator[ChoiceDelta, None]:
        """Yield pieces of all choices as they arrive, from when the engine has accepted all choices: the first piece of
        each is empty, or its end. Closing early aborts the choices. Raises ApiError, EngineDead.
        """
        with self.service.admit(len(self.choices), sum(len(choice.prompt) for choice in self.choices)) as client:
            stops = stop_strings(self.choices[0].params)
            # Queued in this order: of several choices from one prompt, the first computes it, and the engine lets the
            # others wait for its pages.
            runs = [self._run(client, choice, stops) for choice in self.choices]
            held: list[ChoiceDelta] = []
            accepted: set[int] = set()
            async with aclosing(merge(runs)) as merged:
                async for piece in merged:
                    held.append(piece)
                    accepted.add(piece.index)
                    if len(accepted) == len(self.choices):  # no choice can be refused any more
                        for each in held:
                            self._count(each)
                            yield each
                        held.clear()

    def _count(self, piece: ChoiceDelta) -> None:
        self.usage.cached_tokens += piece.cached_tokens
        self.usage.completion_tokens += len(piece.delta.tokens)
        self.usage.accepted += piece.delta.accepted
        self.usage.rejected += piece.rejected

    async def _run(
        self, client: Supervisor, choice: Choice, stops: Sequence[StopString]
    ) -> AsyncGenerator[ChoiceDelta, None]:
        nothing = choice.params.max_tokens == 0
        empty = Delta("", [], [], None if choice.params.logprobs is None else [], 0, 0, None, None)
        if nothing and choice.params.prompt_logprobs is None:
            yield ChoiceDelta(choice.index, replace(empty, finish_reason=FINISH_LENGTH))
            return
        context = choice.prompt if choice.continues else ()
        scope = choice.new_scope() if choice.new_scope else None
        stream = TextStream(self.service.tokenizer, choice.params, context, stops, choice.shown, scope)
        request = AddRequest(
            uuid.uuid4().hex,
            choice.prompt,
            choice.params,
            self.arrival,
            choice.priority,
            cache_salt=choice.cache_salt,
        )
        stats = RequestStats(self.arrival, len(choice.prompt))
        try:
            async with aclosing(client.generate(request)) as outputs:
                async for output in outputs:
                    if output.error is not None:
                        raise _error_of(output, output.error)
                    if output.queued:
                        yield ChoiceDelta(choice.index, empty)
                        continue
                    delta = replace(empty, finish_reason=output.finish_reason) if nothing else stream.take(output)
                    known = stats.cached_tokens
                    seconds = stats.take(output, delta)
                    if self.first is None and output.tokens:
                        self.first = stats.last
                    self.service.metrics.round(stats, len(delta.tokens), seconds)
                    report = round_report(stats, output, delta) if choice.report else None
                    cached = stats.cached_tokens - known if choice.first else 0
                    rejected = output.drafted - output.accepted
                    yield ChoiceDelta(choice.index, delta, report, output.prompt_logprobs, cached, rejected)
                    if stats.reason is not None:
                        return
        finally:
            self.service.metrics.finished(stats.reason or FINISH_ABORT)
            if self.service.tracing:
                self.service.tracing.send(stats, self.parent)


def _error_of(output: RequestOutput, reason: str) -> ApiError:
    if output.retry is not None:
        return unavailable(reason, output.retry)
    return ApiError(reason, status=500 if output.is_server_fault else 400, code="cannot_serve")


async def merge(sources: Sequence[AsyncGenerator[ChoiceDelta, None]]) -> AsyncGenerator[ChoiceDelta, None]:
    """Yield items of all sources as they arrive. The first exception ends all sources; so does closing."""
    queue: asyncio.Queue[ChoiceDelta | Exception | None] = asyncio.Queue()

    async def pump(source: AsyncGenerator[ChoiceDelta, None]) -> None:
        try:
            async with aclosing(source):
                async for item in source:
                    queue.put_nowait(item)
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    pumps = [asyncio.create_task(pump(source)) for source in sources]
    try:
        running = len(pumps)
        while running:
            item = await queue.get()
            if item is None:
                running -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
