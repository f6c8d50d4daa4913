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

from engine.config import EngineConfig
from engine.core import Engine
from engine.messages import AddRequest, EngineStats
from engine.params import SamplingParams
from engine.plan import StepPlan, StepResult
from engine.request import Request
from engine.stats import acceptance

_TURN = 4  # rounds with one gamma before the next one's turn


class TurnsOfGamma:
    """A controller that is told the gamma of each round from outside."""

    def __init__(self, gamma_max: int) -> None:
        self._gamma_max = gamma_max
        self.gamma = 0

    @property
    def gamma_max(self) -> int:
        return self._gamma_max

    def choose(self, rows: Sequence[Request]) -> list[int]:
        return [self.gamma] * len(rows)

    def observe(self, plan: StepPlan, result: StepResult) -> None:
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

    prompts: one per row, all of one length. Raises RequestError if prompt and output do not fit the model.
    """
    config = config.model_copy(update={"scheduler": _roomy(config, len(prompts), max(gammas))})
    controller = TurnsOfGamma(max(gammas))
    engine = Engine(config, controller=controller, progress=False)
    try:
        params = SamplingParams(
            # Rows that are prefilled first decode while the others are; turns end a little late.
            max_tokens=min(
                new_tokens * len(gammas) + len(prompts) * len(prompts[0]) // config.scheduler.max_batch_tokens + 64,
                engine.ready.max_model_len - len(prompts[0]),
            ),
            temperature=temperature,
            ignore_eos=True,
        )
        for i, prompt in enumerate(prompts):
            engine.add(AddRequest(str(i), list(prompt), params))
        ready: set[str] = set()
        while len(ready) < len(prompts):
            ready |= {output.id for output in engine.step()}
        rounds = _run_turns(engine, controller, gammas, new_tokens, len(prompts))
    finally:
        engine.close()
    plain = rounds.get(0)
    return [_result(gamma, rounds[gamma], plain, config, len(prompts), len(prompts[0]), engine) for gamma in gammas]


def _roomy(config: EngineConfig, batch: int, gamma: int) -> object:
    """The scheduler settings of `config`, with room for the whole batch."""
    needed = batch * (gamma + 1) + 1  # no row's drafts are cut short for another's
    return config.scheduler.model_copy(
        update={"max_rows": batch, "max_batch_tokens": max(needed, config.scheduler.max_batch_tokens)}
    )


def _run_turns(
    engine: Engine, controller: TurnsOfGamma, gammas: Sequence[int], new_tokens: int, batch: int
) -> dict[int, _Rounds]:
    rounds = {gamma: _Rounds() for gamma in gammas}
    for gamma in gammas:  # one round each to warm up
        controller.gamma = gamma
        engine.step()
    unfinished = list(gammas)
    while unfinished:
        for gamma in list(unfinished):
            controller.gamma = gamma
            for _ in range(_TURN):
                before, began = engine.stats(), perf_counter()
                engine.step()
                seconds, after = perf_counter() - began, engine.stats()
                if after.running < batch:
                    return rounds  # the model's length is reached
                rounds[gamma].add(before, after, seconds, (after.prompt_tokens + after.generated_tokens) / batch)
            if rounds[gamma].total.generated_tokens >= new_tokens * batch:
                unfinished.remove(gamma)
    return rounds


def _result(
    gamma: int, rounds: _Rounds, plain: _Rounds | None, config: EngineConfig, batch: int, context: int, engine: Engine
) -> DecodeResult:
    speed = mean(rounds.tokens) / median(rounds.seconds)
    kv_bytes = rounds.total.kv_tokens_read * engine.stats().kv_bytes_per_token
    return DecodeResult(
        batch=batch,
        context=context,
        speculation=gamma,
        policy=config.speculation.kv.policy if gamma else "none",
        budget=config.speculation.kv.budget if gamma else 0,
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
