"""Offline decode speed, several amounts of speculation side by side in one run.

All requests are prefilled first, outside the clock. Then rounds are run in short turns - so many rounds with each
value of gamma, over and over - on the same rows, so that machine noise and the growing context meet all values alike.
That is fair because speculation does not change the tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import mean, median
from time import perf_counter

import msgspec

from bench.corpus import BenchError
from engine.config import EngineConfig, SchedulerConfig
from engine.core import Engine
from engine.messages import AddRequest, EngineStats, RequestOutput
from engine.params import SamplingParams
from engine.plan import StepPlan, StepResult
from engine.request import Request
from engine.speculation.controller import Report
from engine.stats import acceptance

_TURN = 4  # rounds with one gamma before the next one's turn


class TurnsOfGamma:
    """A controller that is told the gamma of each round from outside."""

    def __init__(self, gamma_max: int) -> None:
        self._gamma_max = gamma_max
        self.gamma = 0
        self.report = Report()
        self.budget = 0

    @property
    def gamma_max(self) -> int:
        return self._gamma_max

    def choose(self, rows: Sequence[Request]) -> list[int]:
        return [self.gamma] * len(rows)

    def observe(self, plan: StepPlan, requests: Sequence[Request], result: StepResult) -> None:
        """What a round took is read off the engine's statistics."""


@dataclass(frozen=True, slots=True)
class DecodeResult:
    """One (batch, context, gamma). Times are medians over rounds, in milliseconds; the rest are means.

    tokens_per_second: of the whole batch, mean tokens per round over the median round.
    t_target_ms: a plain round of the same run, if one was measured. t_draft_ms: one draft step. t_verify_ms: the
    target pass, which for gamma = 0 is the plain step. kv_bytes_per_token: KV read per emitted token, draft included.
    bytes_per_second: weights and KV that a round has to read, over its time.
    """

    batch: int
    context: int
    speculation: int
    policy: str
    budget: int
    tokens_per_second: float
    acceptance: float | None
    t_target_ms: float | None
    t_draft_ms: float | None
    t_verify_ms: float
    t_host_ms: float
    kv_bytes_per_token: float
    bytes_per_second: float
    speedup: float | None
    rounds: int
    mean_context: float


@dataclass(slots=True)
class _Rounds:
    """What the rounds of one gamma were like."""

    seconds: list[float] = field(default_factory=list)
    draft: list[float] = field(default_factory=list)
    verify: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    total: EngineStats = field(default_factory=EngineStats)
    contexts: list[float] = field(default_factory=list)

    def add(self, before: EngineStats, after: EngineStats, seconds: float, context: float) -> None:
        self.seconds.append(seconds)
        self.draft.append(after.draft_seconds - before.draft_seconds)
        self.verify.append(after.verify_seconds - before.verify_seconds)
        self.host.append(after.host_seconds - before.host_seconds)
        self.tokens.append(after.generated_tokens - before.generated_tokens)
        self.contexts.append(context)
        for name in ("accepted_tokens", "rejections", "kv_tokens_read", "generated_tokens"):
            setattr(self.total, name, getattr(self.total, name) + getattr(after, name) - getattr(before, name))


def measure(
    config: EngineConfig,
    prompts: Sequence[Sequence[int]],
    gammas: Sequence[int],
    *,
    new_tokens: int,
    temperature: float = 0.0,
) -> list[DecodeResult]:
    """Decode `new_tokens` per row with each of `gammas`.

    prompts: one per row, all of one length. Raises BenchError if prompt and output do not fit the model.
    """
    batch, context = len(prompts), len(prompts[0])
    scheduler = _roomy(config.scheduler, batch, max(gammas))
    config = config.model_copy(update={"scheduler": scheduler})
    controller = TurnsOfGamma(max(gammas))
    engine = Engine(config, controller=controller, progress=False)
    try:
        # Rows that are prefilled first decode while the others are, and a turn can overshoot.
        drift = batch * context // (scheduler.max_batch_tokens - batch) + 1
        wanted = context + drift + sum(new_tokens + (_TURN + 1) * (gamma + 1) for gamma in gammas)
        if wanted > engine.ready.max_model_len:
            raise BenchError(
                f"{context} tokens of context and {len(gammas)} x {new_tokens} new ones take {wanted} with what "
                f"prefill and turns add, but the model has {engine.ready.max_model_len}"
            )
        room = engine.ready.max_model_len - context
        params = msgspec.convert({"max_tokens": room, "temperature": temperature, "ignore_eos": True}, SamplingParams)
        for i, prompt in enumerate(prompts):
            engine.add(AddRequest(str(i), list(prompt), params))
        ready: set[str] = set()
        while len(ready) < batch:
            ready |= {output.id for output in _step(engine)}
        rounds = _run_turns(engine, controller, gammas, new_tokens, batch)
    finally:
        engine.close()
    plain = rounds.get(0)
    return [_result(gamma, rounds[gamma], plain, config, batch, context, engine) for gamma in gammas]


def _step(engine: Engine) -> list[RequestOutput]:
    """One round. Raises BenchError if memory does not suffice for it."""
    outputs = engine.step()
    if failed := [output.error for output in outputs if output.error is not None]:
        raise BenchError(failed[0])
    return outputs


def _roomy(scheduler: SchedulerConfig, batch: int, gamma: int) -> SchedulerConfig:
    """These settings, with room for the whole batch: no row's drafts are cut short for another's."""
    tokens = max(batch * (gamma + 1) + 1, scheduler.max_batch_tokens)
    return scheduler.model_copy(update={"max_rows": batch, "max_batch_tokens": tokens})


def _run_turns(
    engine: Engine, controller: TurnsOfGamma, gammas: Sequence[int], new_tokens: int, batch: int
) -> dict[int, _Rounds]:
    """The next turn is always that of the gamma with the fewest tokens, so all meet the same contexts."""
    rounds = {gamma: _Rounds() for gamma in gammas}
    for gamma in gammas:  # one round each to warm up
        controller.gamma = gamma
        _step(engine)
    while True:
        gamma = min(gammas, key=lambda gamma: rounds[gamma].total.generated_tokens)
        if rounds[gamma].total.generated_tokens >= new_tokens * batch:
            return rounds
        controller.gamma = gamma
        for _ in range(_TURN):
            before, began = engine.stats(), perf_counter()
            _step(engine)
            seconds, after = perf_counter() - began, engine.stats()
            if after.running < batch:
                raise BenchError("a row reached the model's length before all rows had their tokens: ask for fewer")
            context = (after.prompt_tokens + after.generated_tokens) / batch
            rounds[gamma].add(before, after, seconds, context)


def _result(
    gamma: int, rounds: _Rounds, plain: _Rounds | None, config: EngineConfig, batch: int, context: int, engine: Engine
) -> DecodeResult:
    speed = mean(rounds.tokens) / median(rounds.seconds)
    kv_bytes = rounds.total.kv_tokens_read * engine.stats().kv_token_bytes
    return DecodeResult(
        batch=batch,
        context=context,
        speculation=gamma,
        policy=config.speculation.kv.policy if gamma else "none",
        budget=config.speculation.kv.budget or 0 if gamma else 0,
        tokens_per_second=speed,
        acceptance=acceptance(rounds.total) if gamma else None,
        t_target_ms=1e3 * median(plain.seconds) if plain else None,
        t_draft_ms=1e3 * median(rounds.draft) / gamma if gamma else None,
        t_verify_ms=1e3 * median(rounds.verify),
        t_host_ms=1e3 * median(rounds.host),
        kv_bytes_per_token=kv_bytes / rounds.total.generated_tokens,
        bytes_per_second=(engine.weight_bytes * (gamma + 1) + kv_bytes / len(rounds.seconds)) / median(rounds.seconds),
        speedup=speed / (mean(plain.tokens) / median(plain.seconds)) if plain else None,
        rounds=len(rounds.seconds),
        mean_context=mean(rounds.contexts),
    )


def table(results: Iterable[DecodeResult], ceiling: float) -> str:
    """Results as text; `ceiling`: what a sequential read reaches, bytes per second."""
    head = (
        "batch",
        "context",
        "draft",
        "tok/s",
        "x off",
        "accept",
        "T_T ms",
        "T_D ms",
        "T_V ms",
        "host ms",
        "KV MB/tok",
        "GB/s",
        "of read",
    )
    lines = ["".join(f"{name:>11}" for name in head)]
    for result in results:
        cells = (
            str(result.batch),
            str(result.context),
            str(result.speculation or "off"),
            f"{result.tokens_per_second:.1f}",
            _cell(result.speedup, 2),
            _cell(result.acceptance, 3),
            _cell(result.t_target_ms, 1),
            _cell(result.t_draft_ms, 1),
            f"{result.t_verify_ms:.1f}",
            f"{result.t_host_ms:.2f}",
            f"{result.kv_bytes_per_token / 1e6:.1f}",
            f"{result.bytes_per_second / 1e9:.1f}",
            f"{100 * result.bytes_per_second / ceiling:.0f} %",
        )
        lines.append("".join(f"{cell:>11}" for cell in cells))
    lines.append(f"sequential read on this device: {ceiling / 1e9:.1f} GB/s")
    return "\n".join(lines)


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
