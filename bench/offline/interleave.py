"""Interleave engines that decode the same prompts, each with several values of gamma."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter
from typing import Literal

import msgspec

from bench.corpus import BenchError
from engine.config.deployment import EngineConfig, SchedulerConfig
from engine.core import Engine
from engine.messages import AddRequest, EngineStats, RequestOutput
from engine.ngram.ngram_drafts import Proposal
from engine.params import SamplingParams
from engine.plan import RoundPlan, RoundResult
from engine.scheduler.controller import Controller, ControllerReport, FixedGamma, RowDrafts, Way
from engine.scheduler.request import Request
from models.decoder import DecoderModel

_TURN = 4  # rounds per turn
_COUNTED = (
    *("draft_tokens", "text_draft_tokens", "accepted_tokens", "rejections", "text_accepted_tokens"),
    "model_draft_tokens",
    *("kv_tokens_read", "draft_kv_tokens_read", "generated_tokens"),
)
"""Counters of EngineStats that are summed over measured rounds."""

Gamma = int | Literal["auto"]


class InterleavedController:
    """A controller whose `gamma` the caller sets before each round.

    With "auto" it delegates to the controller `auto`, which learns only from those rounds.
    """

    def __init__(self, gamma_max: int, *, model: bool = True) -> None:
        """gamma_max: largest number of drafts. model: whether there is a model that drafts."""
        self._gamma_max, self._model = gamma_max, model
        self.gamma: Gamma = 0
        self.auto: Controller = FixedGamma(gamma_max)
        self.report = ControllerReport()
        self.way = Way()

    @property
    def gamma_max(self) -> int:
        return self._gamma_max

    @property
    def takes_text(self) -> bool:
        return self.auto.takes_text if self.gamma == "auto" else self.gamma > 0

    def begin_round(self) -> None:
        self.auto.begin_round()

    def choose(
        self,
        rows: Sequence[Request],
        shared_tokens: int = 0,
        proposals: Sequence[Proposal] = (),
        share: int | None = None,
    ) -> list[RowDrafts]:
        if self.gamma == "auto":
            drafts = self.auto.choose(rows, shared_tokens, proposals, share)
            self.way = self.auto.way
            return drafts
        self.way = Way()
        return FixedGamma(self.gamma, model=self._model).choose(rows, shared_tokens, proposals, share)

    def observe(self, plan: RoundPlan, requests: Sequence[Request], result: RoundResult) -> None:
        """Pass rounds with "auto" to its controller. Measured times come from the engine's statistics instead."""
        if self.gamma == "auto":
            self.auto.observe(plan, requests, result)


@dataclass(slots=True)
class RoundMeasurements:
    """Measurements of the rounds with one value of --speculation. One item per round in every list."""

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
        """Typical seconds of a round: medians over rounds with the same rounded gamma, weighted by their number."""
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
        for name in _COUNTED:
            setattr(self.total, name, getattr(self.total, name) + getattr(after, name) - getattr(before, name))


class Contender:
    """The engine of one config, and measurements of its rounds by value of --speculation.

    texts: output tokens by the row's request.
    """

    def __init__(self, config: EngineConfig, target: DecoderModel | None, gamma_max: int, auto: bool) -> None:
        self.config = config
        self.rounds: dict[Gamma, RoundMeasurements] = {}
        self.texts: dict[str, list[int]] = {}
        self._controller = InterleavedController(gamma_max, model=config.speculation.max_model_drafts > 0)
        self._batch = self._context = 0
        self._auto = auto
        self.engine = Engine(config, model=target, controller=self._controller, progress=False)

    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        turns: int,
        max_gamma: int,
        new_tokens: int,
        history: int,
        temperature: float,
    ) -> None:
        """Prefill until every row decodes. Rows and measurements of earlier prompts are dropped.

        Raises BenchError if the model has no room for `history` and then `turns` x `new_tokens` more tokens per row.
        """
        batch, context, room = len(prompts), len(prompts[0]), self.engine.ready.max_model_len
        self.engine.abort(self.texts)
        self.rounds, self.texts = {}, {}
        if self._auto:
            self._controller.auto = self.engine.make_controller()
        self._controller.gamma = 0
        self._batch, self._context = batch, context
        # Rows that finish prefill early decode while the others are prefilled. Rows that a draft model has prefilled
        # draft while it prefills the others. A turn can overshoot.
        drift = batch * context // (self.config.scheduler.max_batch_tokens - batch) + 1
        if self.config.speculation.draft_model is not None:
            drift *= max_gamma + 2
        wanted = context + drift + history + turns * (new_tokens + (_TURN + 1) * (max_gamma + 1))
        if wanted > room:
            raise BenchError(
                f"{context} tokens of context and {history} + {turns} x {new_tokens} new ones take {wanted} with what "
                f"prefill and turns add, but the model has {room}"
            )
        fields = {"max_tokens": room - context, "temperature": temperature, "ignore_eos": True}
        params = msgspec.convert(fields, SamplingParams)
        for i, prompt in enumerate(prompts):
            self.engine.add(AddRequest(str(i), list(prompt), params))
        ready: set[str] = set()
        while len(ready) < batch:
            ready |= {output.id for output in self._keep(_step(self.engine))}

    def warm_up(self, gamma: Gamma, history: int) -> None:
        """Run rounds that are not measured.

        With a fixed gamma, up to a round in which all rows draft gamma tokens: a draft model prefills them first. With
        `auto`, until every row has about `history` more tokens that the controller learns from.
        """
        self.rounds[gamma] = RoundMeasurements()
        self._controller.gamma = gamma
        first = self.engine.stats().generated_tokens
        while True:
            before = self.engine.stats()
            self._keep(_step(self.engine))
            after = self.engine.stats()
            if gamma == "auto":
                warm = after.generated_tokens - first >= history * self._batch
            else:
                drafting = after.gamma_chosen[gamma] - before.gamma_chosen[gamma]
                warm = drafting == self._batch or not self.config.speculation.max_model_drafts  # text may propose fewer
            if warm:
                return
            self._check_running(after)

    def turn(self, gamma: Gamma) -> None:
        """Run and measure one turn. Raises BenchError if a row has reached the model's maximum length."""
        engine = self.engine
        self._controller.gamma = gamma
        for _ in range(_TURN):
            before, began = engine.stats(), perf_counter()
            outputs = _step(engine)
            seconds, after = perf_counter() - began, engine.stats()
            self._keep(outputs)
            self._check_running(after)
            context = self._context + after.generated_tokens / self._batch
            self.rounds[gamma].add(before, after, seconds, context)

    def _keep(self, outputs: list[RequestOutput]) -> list[RequestOutput]:
        for output in outputs:
            self.texts.setdefault(output.id, []).extend(output.tokens)
        return outputs

    def _check_running(self, stats: EngineStats) -> None:
        if stats.running < self._batch:
            raise BenchError("a row reached the model's length before all rows had their tokens: ask for fewer")


def _step(engine: Engine) -> list[RequestOutput]:
    """Run one round. Raises BenchError if a request failed in it, for example for lack of memory."""
    outputs = engine.step()
    if failed := [output.error for output in outputs if output.error is not None]:
        raise BenchError(failed[0])
    return outputs


def scheduler_for_batch(scheduler: SchedulerConfig, batch: int, gamma: int) -> SchedulerConfig:
    """Return these settings with room for the whole batch, so that no row's drafts are truncated for another's."""
    tokens = max(batch * (gamma + 1) + 1, scheduler.max_batch_tokens)
    return scheduler.model_copy(update={"max_rows": batch, "max_batch_tokens": tokens})


def run_turns(turns: Sequence[tuple[Contender, Gamma]], wanted: int, history: int) -> None:
    """Run turns until each has `wanted` tokens. The one with the fewest is next, so all see the same contexts."""
    for contender, gamma in turns:
        contender.warm_up(gamma, history)

    def generated(turn: tuple[Contender, Gamma]) -> int:
        contender, gamma = turn
        return contender.rounds[gamma].total.generated_tokens

    while True:
        contender, gamma = turn = min(turns, key=generated)
        if generated(turn) >= wanted:
            return
        contender.turn(gamma)
