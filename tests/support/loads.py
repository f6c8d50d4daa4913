"""Rows that decode under a controller, on a machine whose times are known."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.control.auto import AutoGamma
from engine.control.drafting_model import DraftingModel
from engine.control.step_times import StepSample, StepTimes
from engine.messages import AddRequest
from engine.params import SamplingParams
from engine.plan import DrafterName, RoundPlan, RoundResult, RowResult, RowWork
from engine.scheduler.request import Request

BUDGET = 512
GAMMA_MAX = 6


@dataclass
class Machine:
    """A model of round times: each forward costs a base, a cost per query token and a cost per KV token read. Each
    factor can change while the engine runs."""

    base: float = 10e-3
    token: float = 0.2e-3
    kv: float = 2e-6
    slower: float = 1.0
    drafts: float = 1.0

    def verify(self, contexts: Sequence[int], gammas: Sequence[int]) -> float:
        return self.slower * (self.base + self.token * (len(gammas) + sum(gammas)) + self.kv * sum(contexts))

    def draft(self, contexts: Sequence[int], gammas: Sequence[int], budget: int = BUDGET) -> float:
        total = 0.0
        for step in range(max(gammas)):
            read = [min(context, budget) for context, gamma in zip(contexts, gammas, strict=True) if gamma > step]
            total += self.slower * self.drafts * (self.base + self.token * len(read) + self.kv * sum(read))
        return total

    def samples(self, drafter: DrafterName | None = None) -> list[StepSample]:
        found = []
        for rows in (1, 4, 16):
            for context in (64, 4096):
                for gamma in (0, 1, 3, GAMMA_MAX):
                    batch = [context] * rows, [gamma] * rows
                    times = self.draft(*batch), self.verify(*batch)
                    found.append(StepSample(rows, context, gamma, *times, drafter=drafter))
        return found


def reads(context: int, budget: int) -> int:
    return min(context, budget or BUDGET)


@dataclass
class Load:
    """Rows that decode under a controller on a machine, each with a true acceptance rate. Context lengths stay
    constant."""

    machine: Machine
    contexts: list[int]
    alphas: list[float]
    known: Machine | None = None
    seed: int = 0
    limits: list[int | None] | None = None
    budgets: tuple[int, ...] = (BUDGET,)
    by_budget: dict[int, float] = field(default_factory=dict)
    by_reading: list[tuple[float, float]] | None = None
    own: tuple[Machine, float] | None = None
    """The target's own drafts beside those of a draft model: their times, and their acceptance."""
    prompts: bool = False
    max_tokens: int = 10**6
    lags: list[int] | None = None
    catch_up_s: float = 0.0
    controller: AutoGamma = field(init=False)
    rows: list[Request] = field(init=False)
    chosen: list[list[int]] = field(default_factory=list)
    latest: list[list[bool]] = field(default_factory=list)
    ways: list[DrafterName | None] = field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0
    caught_up: int = 0

    def __post_init__(self) -> None:
        times = StepTimes((self.known or self.machine).samples(), reads)
        model = DraftingModel(times, self.budgets, reads_latest=self.by_reading is not None)
        models = [model]
        if self.own is not None:
            samples = (self.known or self.machine).samples() + self.own[0].samples("self")
            models.append(DraftingModel(StepTimes(samples, reads, drafter="self"), (BUDGET,), name="self"))
        self.controller = AutoGamma(models, GAMMA_MAX)
        self.rng = random.Random(self.seed)
        limits = self.limits or [None] * len(self.contexts)
        self.rows = [
            Request(
                AddRequest(str(i), [0] * context, SamplingParams(max_tokens=self.max_tokens, max_draft_tokens=limit)),
                (),
                i,
            )
            for i, (context, limit) in enumerate(zip(self.contexts, limits, strict=True))
        ]
        for row, lag in zip(self.rows, self.lags or [], strict=False):
            row.draft_lag = lag

    @property
    def prompt(self) -> Request:
        return Request(AddRequest("prompt", [0] * 1000, SamplingParams(max_tokens=9)), (), 0)

    def run(self, rounds: int) -> float:
        """Run this many rounds and return their tokens per second."""
        tokens, seconds = self.tokens, self.seconds
        for _ in range(rounds):
            self._round()
        return (self.tokens - tokens) / (self.seconds - seconds)

    def _round(self) -> None:
        choices = self.controller.choose(self.rows)
        gammas = [min(drafts.model, row.max_draft_tokens) for drafts, row in zip(choices, self.rows, strict=True)]
        latest = [drafts.latest for drafts in choices]
        self.latest.append(latest)
        contexts = [row.num_tokens for row in self.rows]
        work, results = [], []
        left = caught_up = 512
        for i, (row, gamma, alpha) in enumerate(zip(self.rows, gammas, self.alphas, strict=True)):
            accepted = catch_up = 0
            itself = self.controller.way.drafter == "self"
            if gamma and row.draft_lag > 1 and not itself:
                catch_up = min(row.draft_lag, left)
                left -= catch_up
                row.draft_lag -= catch_up
                gammas[i] = gamma = 0 if row.draft_lag else gamma
            alpha = self.by_budget.get(self.controller.way.budget, alpha)
            if self.by_reading is not None:
                alpha = self.by_reading[i][latest[i]]
            if self.own is not None and itself:
                alpha = self.own[1]
            while accepted < gamma and self.rng.random() < alpha:
                accepted += 1
            if self.lags and (itself or not gamma):
                row.draft_lag += 1 + accepted
            work.append(RowWork(i, row.num_tokens - 1, 1, gamma, True, catch_up, latest=latest[i]))
            results.append(RowResult(gamma, accepted, [0] * (accepted + 1), None))
            self.tokens += accepted + 1
        drafting = self.own[0] if self.own is not None and self.controller.way.drafter == "self" else self.machine
        draft = drafting.draft(contexts, gammas, self.controller.way.budget)
        verify = self.machine.verify(contexts, gammas)
        self.ways.append(self.controller.way.drafter)
        draft += (caught_up - left) * self.catch_up_s
        self.caught_up += caught_up - left
        self.seconds += draft + verify
        self.chosen.append(gammas)
        rows = self.rows
        if self.prompts:  # a chunk of a prompt joins the round
            rows, work = [*rows, self.prompt], [*work, RowWork(len(rows), 0, 50, 0, False)]
        self.controller.observe(
            RoundPlan(0, [], [], work, *self.controller.way), rows, RoundResult(0, results, draft, verify)
        )

    def share_off(self, rounds: int) -> float:
        return sum(not any(gammas) for gammas in self.chosen[-rounds:]) / rounds
