"""The controller that decides when to speculate, and how much (MagicDec, arXiv 2408.11049, section 3).

A round is worth its tokens per second. Its time is predicted from the start-up profile, corrected by what rounds have
really taken; its tokens from each row's acceptance. Each round takes the gammas with the highest predicted rate; zero,
plain decoding, is always among them. Where drafts can read with several budgets, so is the budget chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from engine.plan import StepPlan, StepResult
from engine.request import Request
from engine.speculation.controller import Report
from engine.speculation.corrections import Corrections
from engine.speculation.estimates import Estimates
from engine.speculation.step_times import StepTimes

_HYSTERESIS = 1.02
"""Another way to run rounds must promise this much more than the present one."""
_EXPLORE = 0.01
"""The share of time that may be lost to trying what is not thought best."""
_EXPLORE_EVERY = 16
"""Rounds between two tries, at least; and between two looks at other budgets."""


@dataclass(frozen=True, slots=True)
class _Choice:
    """A way to run a round, and what it promises. seconds and tokens: of the whole batch."""

    gammas: list[int]
    budget: int
    seconds: float
    tokens: float

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


class AutoGamma:
    """Chooses per round and per row. Host-side, O(rows × gamma_max)."""

    def __init__(self, times: StepTimes, gamma_max: int, budgets: Sequence[int], reads: int | None = None) -> None:
        """times: of this engine. budgets: KV tokens per row that drafts can be told to read, the largest first; (0,) if
        there is no choice. reads: how many they read then; None: everything, or the largest budget.
        """
        self._times = times
        self._gamma_max = gamma_max
        self._budgets = tuple(budgets)
        self._corrections = Corrections()
        self._estimates = Estimates(budgets[0], reads or budgets[0])
        self._cap = 0
        self._rounds = 0
        self._tries = 0
        self._tried_at = 0
        self._credit = 0.0  # seconds that trying may lose
        self._best: _Choice | None = None
        self._chosen: _Choice | None = None
        self._plain_s = 0.0
        self.budget = self._budgets[0]
        self.report = Report()
        self._present = self.budget

    @property
    def gamma_max(self) -> int:
        return self._gamma_max

    # -- choosing ----------------------------------------------------------------------------------------------------

    def choose(self, rows: Sequence[Request]) -> list[int]:
        """See Controller.choose."""
        self._rounds += 1
        choices = self._choices(rows, self._present)
        if self._rounds % _EXPLORE_EVERY == 0:
            choices = self._look_at_budgets(rows, choices)
        best = max(range(len(choices)), key=lambda cap: choices[cap].rate)
        last = min(self._cap, len(choices) - 1)
        if choices[best].rate < _HYSTERESIS * choices[last].rate:
            best = last
        self._cap = best
        self._best, self._plain_s = choices[best], choices[0].seconds
        self._chosen = self._try(rows, choices, best) or choices[best]
        self.budget = self._chosen.budget
        return self._chosen.gammas

    def _look_at_budgets(self, rows: Sequence[Request], choices: list[_Choice]) -> list[_Choice]:
        """The choices of the budget that promises most."""
        best = max(choice.rate for choice in choices)
        for budget in self._budgets:
            others = self._choices(rows, budget) if budget != self._present else choices
            rate = max(choice.rate for choice in others)
            if rate > _HYSTERESIS * best:
                self._present, choices, best = budget, others, rate
        return choices

    def _try(self, rows: Sequence[Request], choices: Sequence[_Choice], best: int) -> _Choice | None:
        """Now and then, what is not thought best: drafts when they are off, none when they are on, another budget.

        Times that are not measured go stale, and a batch that should speculate again would not be noticed.
        """
        if self._rounds - self._tried_at < _EXPLORE_EVERY:
            return None
        turn = self._tries % len(self._budgets)
        if turn == 0:
            others = choices[1:] if best == 0 else choices[:1]
        else:
            budget = [budget for budget in self._budgets if budget != self._present][turn - 1]
            others = self._choices(rows, budget)[1:]
        losses = [choice.seconds - choice.tokens / choices[best].rate for choice in others]
        if not losses or min(losses) > self._credit:
            # Not to be afforded yet: the next turn's may be.
            self._tries += bool(losses) and len(self._budgets) > 1
            return None
        self._tries += 1
        self._tried_at = self._rounds
        return others[losses.index(min(losses))]

    def _choices(self, rows: Sequence[Request], budget: int) -> list[_Choice]:
        """The best way with at most so many drafts per row, by that number; [0] is plain decoding."""
        count, total = len(rows), sum(request.num_tokens for request in rows)
        contexts = [request.num_tokens for request in rows]
        limits = [min(self._gamma_max, request.most_drafts) for request in rows]
        alphas = [self._estimates.alpha(request.id, request.num_tokens, budget) for request in rows]
        yields = [_yields(alpha, self._gamma_max) for alpha in alphas]
        plain = self._times.verify(count, total, 0) * self._factor("plain", count, total, 0)
        verify = [plain] + [
            self._times.verify(count, total, gamma) * self._factor("verify", count, total, gamma)
            for gamma in range(1, self._gamma_max + 1)
        ]
        factor = self._factor("draft", count, total, budget)
        one, all_rows = (factor * self._times.draft(n, contexts, budget) for n in (1, count))
        per_row = (all_rows - one) / (count - 1) if count > 1 else 0.0

        def choice(gammas: list[int]) -> _Choice:
            mean = sum(gammas) / count
            low = min(int(mean), self._gamma_max - 1)
            seconds = verify[low] + (verify[low + 1] - verify[low]) * (mean - low)
            steps = max(gammas)  # the first row of each costs `one`, the others `per_row`
            seconds += steps * one + (sum(gammas) - steps) * per_row
            tokens = sum(row[gamma] for row, gamma in zip(yields, gammas, strict=True))
            return _Choice(gammas, budget, seconds, tokens)

        choices = [_Choice([0] * count, budget, plain, float(count))]
        for cap in range(1, min(self._gamma_max, max(limits, default=0)) + 1):
            even = choice([min(cap, limit) for limit in limits])
            # A row's next draft has to bring more than the time it takes would bring elsewhere.
            price = even.rate * ((verify[cap] - verify[cap - 1]) / count + per_row)
            worth = [_worthwhile(alpha, price, limit) for alpha, limit in zip(alphas, even.gammas, strict=True)]
            trimmed = choice(worth) if any(worth) and worth != even.gammas else even
            choices.append(max(even, trimmed, key=lambda choice: choice.rate))
        return choices

    # -- learning ----------------------------------------------------------------------------------------------------

    def observe(self, plan: StepPlan, requests: Sequence[Request], result: StepResult) -> None:
        """See Controller.observe."""
        outcomes = iter(result.rows)
        tokens = 0
        for request, work in zip(requests, plan.work, strict=True):
            if not work.samples:
                continue
            outcome = next(outcomes)
            tokens += outcome.accepted + 1
            if outcome.drafted:
                rejected = outcome.accepted < outcome.drafted
                self._estimates.judged(request.id, work.computed + 1, plan.budget, outcome.accepted, rejected)
            if request.finish_reason is not None:
                self._estimates.forget(request.id)
        self._estimates.keep_only((request.id for request in requests), beyond=2 * len(requests) + 1000)
        decoding = all(work.new == 1 and work.samples for work in plan.work) and not plan.starts
        if self._chosen is not None and self._best is not None:
            if decoding:
                self._timed(plan, result, tokens, self._chosen)
            else:
                # Prompts among them: nobody knows what the drafts took, so a try costs what it was thought to.
                self._spend(self._best.seconds, self._chosen.seconds, self._chosen.tokens)
        self._chosen = None

    def _timed(self, plan: StepPlan, result: StepResult, tokens: int, chosen: _Choice) -> None:
        gammas = [work.gamma for work in plan.work]
        contexts = [work.computed + 1 for work in plan.work]
        count, total, mean = len(gammas), sum(contexts), sum(gammas) / len(gammas)
        predicted = self._times.verify(count, total, mean)
        kind = "verify" if mean else "plain"
        self._corrections.observe(kind, _bucket(count, total, round(mean)), result.verify_seconds, predicted)
        if mean:
            steps = [sum(gamma > step for gamma in gammas) for step in range(max(gammas))]
            predicted = sum(self._times.draft(rows, contexts, plan.budget) for rows in steps)
            self._corrections.observe("draft", _bucket(count, total, plan.budget), result.draft_seconds, predicted)
        seconds = result.draft_seconds + result.verify_seconds
        self._spend(seconds, seconds, tokens)
        plain = tokens / count * self._plain_s
        self.report.decode_seconds += seconds
        self.report.plain_seconds += plain
        self.report.forecast_seconds += plain * (chosen.seconds / chosen.tokens) / (self._plain_s / count)
        self.report.alpha = self._estimates.overall(plan.budget)

    def _spend(self, earned: float, seconds: float, tokens: float) -> None:
        """A share of `earned` seconds may be lost to tries; a round of these seconds and tokens may have been one."""
        assert self._best is not None
        self._credit = min(self._credit + _EXPLORE * earned, 10 * earned)
        if self._chosen is not self._best:
            self._credit -= max(0.0, seconds - tokens / self._best.rate)

    def _factor(self, kind: str, rows: int, total: int, detail: int) -> float:
        return self._corrections.factor(kind, _bucket(rows, total, detail))


def _bucket(rows: int, total: int, detail: int) -> tuple[int, int, int]:
    """Batches of about this size. detail: gamma, or the drafts' budget."""
    return rows.bit_length(), total.bit_length(), detail


def _yields(alpha: float, gamma_max: int) -> list[float]:
    """Expected tokens of a row, by gamma: Ω(γ, α) of the cost model."""
    return list(accumulate(alpha**gamma for gamma in range(gamma_max + 1)))


def _worthwhile(alpha: float, price: float, limit: int) -> int:
    """The most drafts of which each is worth `price` tokens: draft s holds with probability alpha^s."""
    gamma, worth = 0, alpha
    while gamma < limit and worth >= price:
        gamma += 1
        worth *= alpha
    return gamma
