"""Offline decode speed, several amounts and kinds of speculation side by side in one run.

All requests are prefilled first, outside the clock. Then rounds are run in short turns - so many rounds with each
value of gamma, over and over - on the same rows, so that machine noise and the growing context meet all values alike.
That is fair because speculation does not change the tokens.

Each KV policy has an engine of its own, with the same prompts, and the turns go round the engines. A policy's rounds so
bear what it costs to keep its own caches up to date, and nothing of another's. On one rank the engines share the
target's weights. Plain rounds are measured in the first engine, for all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import mean, median
from time import perf_counter
from typing import Literal

import msgspec
import torch

from bench.corpus import BenchError
from engine.config import EngineConfig, SchedulerConfig
from engine.core import Engine, load_target
from engine.messages import AddRequest, EngineStats, RequestOutput
from engine.params import SamplingParams
from engine.plan import StepPlan, StepResult
from engine.request import Request
from engine.speculation.controller import Controller, FixedGamma, Report
from engine.speculation.cost_model import speedup
from engine.stats import acceptance
from models.llama import Llama

_TURN = 4  # rounds with one gamma before the next one's turn


Gamma = int | Literal["auto"]


class TurnsOfGamma:
    """A controller that is told the gamma of each round from outside, or whom to ask: `auto` learns from its own rounds
    only."""

    def __init__(self, gamma_max: int) -> None:
        self._gamma_max = gamma_max
        self.gamma: Gamma = 0
        self.auto: Controller = FixedGamma(gamma_max)
        self.report = Report()
        self.budget = 0

    @property
    def gamma_max(self) -> int:
        return self._gamma_max

    def choose(self, rows: Sequence[Request]) -> list[int]:
        if self.gamma == "auto":
            gammas = self.auto.choose(rows)
            self.budget = self.auto.budget
            return gammas
        self.budget = 0
        return [self.gamma] * len(rows)

    def observe(self, plan: StepPlan, requests: Sequence[Request], result: StepResult) -> None:
        """What a round took is read off the engine's statistics."""
        if self.gamma == "auto":
            self.auto.observe(plan, requests, result)


@dataclass(frozen=True, slots=True)
class DecodeResult:
    """One (batch, context, gamma). Times are medians over rounds, in milliseconds; the rest are means.

    tokens_per_second: of the whole batch, mean tokens per round over the median round; where gamma differs from round
    to round, over the medians of rounds with the same, as often as each was chosen. gamma: its mean over the rounds.
    t_target_ms: a plain round of the same run, if one was measured. t_draft_ms: one draft step. t_verify_ms: the
    target pass, which for gamma = 0 is the plain step. kv_bytes_per_token: KV read per emitted token, draft included.
    bytes_per_second: weights and KV that a round has to read, over its time. predicted: the speed-up that the cost
    model's first half (engine.speculation.cost_model) makes of the acceptance and the three times measured here.
    """

    batch: int
    context: int
    speculation: Gamma
    gamma: float
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
    predicted: float | None
    rounds: int
    mean_context: float


@dataclass(slots=True)
class _Rounds:
    """What the rounds of one value of --speculation were like."""

    seconds: list[float] = field(default_factory=list)
    draft: list[float] = field(default_factory=list)
    verify: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    total: EngineStats = field(default_factory=EngineStats)
    contexts: list[float] = field(default_factory=list)
    gammas: list[float] = field(default_factory=list)

    @property
    def typical_s(self) -> float:
        """Seconds of a round: the median of its kind, over all kinds as often as they came."""
        kinds: dict[int, list[float]] = {}
        for gamma, seconds in zip(self.gammas, self.seconds, strict=True):
            kinds.setdefault(round(gamma), []).append(seconds)
        return sum(len(kind) * median(kind) for kind in kinds.values()) / len(self.seconds)

    def add(self, before: EngineStats, after: EngineStats, seconds: float, context: float) -> None:
        self.seconds.append(seconds)
        self.draft.append(after.draft_seconds - before.draft_seconds)
        self.verify.append(after.verify_seconds - before.verify_seconds)
        self.host.append(after.host_seconds - before.host_seconds)
        self.tokens.append(after.generated_tokens - before.generated_tokens)
        self.contexts.append(context)
        chosen = [b - a for a, b in zip(before.gamma_chosen, after.gamma_chosen, strict=True)]
        self.gammas.append(sum(gamma * count for gamma, count in enumerate(chosen)) / max(1, sum(chosen)))
        for name in ("accepted_tokens", "rejections", "kv_tokens_read", "generated_tokens"):
            setattr(self.total, name, getattr(self.total, name) + getattr(after, name) - getattr(before, name))


def measure(
    configs: Sequence[EngineConfig],
    prompts: Sequence[Sequence[int]],
    gammas: Sequence[Gamma],
    *,
    new_tokens: int,
    temperature: float = 0.0,
) -> list[DecodeResult]:
    """Decode `new_tokens` per row with each of `gammas`, as each of `configs` says.

    configs: of one target; they differ in their speculation. With `auto` among the gammas, theirs must be too: their
    gamma_max bounds it. prompts: one per row, all of one length.
    Raises BenchError if prompt and output do not fit the model.
    """
    config, batch = configs[0], len(prompts)
    ranks = config.tensor_parallel_size
    target = load_target(config, progress=False) if len(configs) > 1 and ranks == 1 else None
    threads = config.threads or max(1, torch.get_num_threads() // ranks)  # before an engine changes their number
    most = max(config.speculation.gamma_max if gamma == "auto" else gamma for gamma in gammas)
    scheduler = _roomy(config.scheduler, batch, most)
    contenders: list[_Contender] = []
    with contextlib.ExitStack() as stack:
        for described in configs:
            settings = described.model_copy(update={"scheduler": scheduler, "threads": threads})
            contender = _Contender(settings, target, most, "auto" in gammas)
            stack.callback(contender.engine.close)
            contenders.append(contender)
            contender.prefill(prompts, len(gammas), most, new_tokens, temperature)
        drafting = [gamma for gamma in gammas if gamma]
        turns = [(contenders[0], gamma) for gamma in gammas]
        turns += [(contender, gamma) for contender in contenders[1:] for gamma in drafting]
        _run_turns(turns, new_tokens * batch)
        plain = contenders[0].rounds.get(0)
        return [_result(gamma, contender, plain, prompts) for contender, gamma in turns]


class _Contender:
    """One policy's engine, and what its rounds were like, by value of --speculation."""

    def __init__(self, config: EngineConfig, target: Llama | None, gamma_max: int, auto: bool) -> None:
        self.config = config
        self.rounds: dict[Gamma, _Rounds] = {}
        self._controller = TurnsOfGamma(gamma_max)
        self._batch = 0
        self.engine = Engine(config, model=target, controller=self._controller, progress=False)
        if auto:
            self._controller.auto = self.engine.make_controller()

    def prefill(
        self, prompts: Sequence[Sequence[int]], turns: int, most: int, new_tokens: int, temperature: float
    ) -> None:
        """Until every row decodes. Raises BenchError if there is no room for what comes."""
        batch, context, room = len(prompts), len(prompts[0]), self.engine.ready.max_model_len
        self._batch = batch
        # Rows that are prefilled first decode while the others are, and a turn can overshoot.
        drift = batch * context // (self.config.scheduler.max_batch_tokens - batch) + 1
        wanted = context + drift + turns * (new_tokens + (_TURN + 1) * (most + 1))
        if wanted > room:
            raise BenchError(
                f"{context} tokens of context and {turns} x {new_tokens} new ones take {wanted} with what "
                f"prefill and turns add, but the model has {room}"
            )
        fields = {"max_tokens": room - context, "temperature": temperature, "ignore_eos": True}
        params = msgspec.convert(fields, SamplingParams)
        for i, prompt in enumerate(prompts):
            self.engine.add(AddRequest(str(i), list(prompt), params))
        ready: set[str] = set()
        while len(ready) < batch:
            ready |= {output.id for output in _step(self.engine)}

    def warm_up(self, gamma: Gamma) -> None:
        """One round that does not count."""
        self.rounds[gamma] = _Rounds()
        self._controller.gamma = gamma
        _step(self.engine)

    def turn(self, gamma: Gamma) -> None:
        """Raises BenchError if a row has reached the model's length."""
        engine = self.engine
        self._controller.gamma = gamma
        for _ in range(_TURN):
            before, began = engine.stats(), perf_counter()
            _step(engine)
            seconds, after = perf_counter() - began, engine.stats()
            if after.running < self._batch:
                raise BenchError("a row reached the model's length before all rows had their tokens: ask for fewer")
            context = (after.prompt_tokens + after.generated_tokens) / self._batch
            self.rounds[gamma].add(before, after, seconds, context)


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


def _run_turns(turns: Sequence[tuple[_Contender, Gamma]], wanted: int) -> None:
    """The next turn is always that of the one with the fewest tokens, so all meet the same contexts."""
    for contender, gamma in turns:
        contender.warm_up(gamma)

    def generated(turn: tuple[_Contender, Gamma]) -> int:
        contender, gamma = turn
        return contender.rounds[gamma].total.generated_tokens

    while True:
        contender, gamma = turn = min(turns, key=generated)
        if generated(turn) >= wanted:
            return
        contender.turn(gamma)


def _result(
    speculation: Gamma, contender: _Contender, plain: _Rounds | None, prompts: Sequence[Sequence[int]]
) -> DecodeResult:
    rounds, engine, kv = contender.rounds[speculation], contender.engine, contender.config.speculation.kv
    seconds, t_verify = rounds.typical_s, median(rounds.verify)
    gamma = mean(rounds.gammas)
    speed = mean(rounds.tokens) / seconds
    kv_bytes = rounds.total.kv_tokens_read * engine.stats().kv_token_bytes
    t_target = median(plain.seconds) if plain else None
    alpha = acceptance(rounds.total) if gamma else None
    t_draft = median(rounds.draft) / gamma if gamma and speculation != "auto" else None
    predicted = None
    if t_target is not None and alpha is not None and t_draft is not None and speculation != "auto":
        predicted = speedup(speculation, alpha, t_target, t_draft, t_verify)
    return DecodeResult(
        batch=len(prompts),
        context=len(prompts[0]),
        speculation=speculation,
        gamma=gamma,
        policy=kv.policy if gamma else "none",
        budget=kv.budget or 0 if gamma else 0,
        tokens_per_second=speed,
        acceptance=alpha,
        t_target_ms=_ms(t_target),
        t_draft_ms=_ms(t_draft),
        t_verify_ms=1e3 * t_verify,
        t_host_ms=1e3 * median(rounds.host),
        kv_bytes_per_token=kv_bytes / rounds.total.generated_tokens,
        bytes_per_second=(engine.weight_bytes * (gamma + 1) + kv_bytes / len(rounds.seconds)) / seconds,
        speedup=speed / (mean(plain.tokens) / plain.typical_s) if plain else None,
        predicted=predicted,
        rounds=len(rounds.seconds),
        mean_context=mean(rounds.contexts),
    )


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


def table(results: Iterable[DecodeResult], ceiling: float) -> str:
    """Results as text; `ceiling`: what a sequential read reaches, bytes per second."""
    head = (
        "batch",
        "context",
        "policy",
        "draft",
        "gamma",
        "tok/s",
        "x off",
        "x model",
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
            result.policy,
            str(result.speculation or "off"),
            f"{result.gamma:.2f}",
            f"{result.tokens_per_second:.1f}",
            _cell(result.speedup, 2),
            _cell(result.predicted, 2),
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
    lines.append("x model: the cost model's speed-up, Ω·T_T / (γ·T_D + T_V), from the times and acceptance of this run")
    lines.append(f"sequential read on this device: {ceiling / 1e9:.1f} GB/s")
    return "\n".join(lines)


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
