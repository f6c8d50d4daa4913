"""Controller that decides when to speculate, and how much (MagicDec, arXiv 2408.11049, section 3).

Each round runs the option with the highest predicted tokens per second (engine.control.goodput): gamma per row, and the
budget where drafts can read with several. Plain decoding, gamma = 0, is always an option. Predictions start from the
profile and are corrected by the times and the acceptance of real rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from engine.control.acceptance import AcceptanceEstimates
from engine.control.calibration import Calibration
from engine.control.catch_up import CatchUp, needs_catch_up, only_smallest_lag
from engine.control.goodput import Batch, Goodput, Option, Options, draft_bucket, verify_bucket
from engine.control.step_times import StepTimes
from engine.plan import RoundPlan, RoundResult
from engine.scheduler.controller import ControllerReport
from engine.scheduler.request import Request

_HYSTERESIS = 1.02
"""Factor by which another option's predicted throughput must exceed the current one's."""
_EXPLORE = 0.01
"""Share of time that may be lost to exploring options that are not predicted to be best."""
_EXPLORE_EVERY = 16
"""Smallest number of rounds between two explorations, and between two comparisons of budgets."""


@dataclass(frozen=True, slots=True)
class _Decision:
    """Decision for one round. best: the option predicted to be best. chosen: that one, or an exploration. plain_s:
    predicted seconds of a plain round."""

    batch: Batch
    best: Option
    chosen: Option
    plain_s: float


class AutoGamma:
    """Controller that chooses gamma per round and row. Host-side, O(rows × gamma_max)."""

    def __init__(
        self, times: StepTimes, gamma_max: int, budgets: Sequence[int], tokens_read: int | None = None
    ) -> None:
        """times: of this engine. budgets: KV tokens per row that drafts may read, the largest first; (0,) if there is
        no choice. tokens_read: largest number that drafts read; None: the largest budget, or all tokens if that is 0.
        """
        self._times = times
        self._gamma_max = gamma_max
        self._budgets = tuple(budgets)
        self._calibration = Calibration()
        self._acceptance = AcceptanceEstimates(budgets[0], tokens_read or budgets[0])
        self._goodput = Goodput(times, self._calibration, self._acceptance, gamma_max)
        self._catch_up = CatchUp()
        self._rounds = 0
        self._explorations = 0
        self._explored_at = 0
        self._explore_credit = 0.0  # seconds that explorations may lose
        # The current option; kept until another one is predicted to be clearly faster.
        self._max_gamma, self._current_budget = 0, self._budgets[0]
        self._pending: _Decision | None = None
        self.budget = self._budgets[0]
        self.report = ControllerReport()

    @property
    def gamma_max(self) -> int:
        return self._gamma_max

    # -- choosing ----------------------------------------------------------------------------------------------------

    def choose(self, rows: Sequence[Request], shared_tokens: int = 0) -> list[int]:
        """See Controller.choose."""
        self._rounds += 1
        batch = Batch.from_requests(rows, self._gamma_max, shared_tokens)
        options = self._goodput.options(batch, self._current_budget)
        if self._rounds % _EXPLORE_EVERY == 0:
            options = self._compare_budgets(batch, options)
        drafting = batch
        if any(needs_catch_up(request) for request in rows):
            saved = 1 / options.rates[0] - 1 / options.rates.max()
            drafting = batch.limited(self._catch_up.worthwhile(rows, batch.limits, saved))
            options = self._goodput.options(drafting, self._current_budget)
        self._max_gamma = self._stay(options)
        best = options[self._max_gamma]
        chosen = self._explore(drafting, batch, options, best) or best
        self._pending = _Decision(batch, best, chosen, float(options.seconds[0]))
        self.budget = chosen.budget
        return chosen.gammas

    def _stay(self, options: Options) -> int:
        """Return the best max_gamma, or the current one if that is about as good."""
        best, last = options.best, min(self._max_gamma, len(options) - 1)
        return last if options.rates[best] < _HYSTERESIS * options.rates[last] else best

    def _compare_budgets(self, batch: Batch, options: Options) -> Options:
        """Return the options with the budget of the highest predicted throughput."""
        best = options.rates.max()
        for budget in self._budgets:
            others = self._goodput.options(batch, budget) if budget != self._current_budget else options
            if others.rates.max() > _HYSTERESIS * best:
                self._current_budget, options, best = budget, others, others.rates.max()
        return options

    def _explore(self, drafting: Batch, batch: Batch, options: Options, best: Option) -> Option | None:
        """Return, at intervals, an option that is not predicted to be best: drafts when they are off, none when they
        are on, another budget.

        Times that are not measured go stale, and a batch that should speculate again would go undetected. Where a draft
        model lacks the tokens of all rows, it catches up on one row, a part with each exploration. This time is charged
        when it is known, and the next exploration waits until the credit covers it.
        """
        if self._rounds - self._explored_at < _EXPLORE_EVERY:
            return None
        turn = self._explorations % len(self._budgets)
        self._explorations += 1
        if turn:
            options = self._goodput.options(
                drafting, [budget for budget in self._budgets if budget != self._current_budget][turn - 1]
            )
        elif not drafting.limits.any():
            options = self._goodput.options(
                batch.limited(only_smallest_lag(batch.rows, batch.limits)), self._current_budget
            )
        others = range(1, len(options)) if turn or not any(best.gammas) else range(1)
        losses = {each: float(options.seconds[each] - options.tokens[each] / best.rate) for each in others}
        max_gamma = min(losses, key=losses.__getitem__, default=0)
        if not losses or losses[max_gamma] > self._explore_credit:
            return None  # too expensive for now; the next option may not be
        self._explored_at = self._rounds
        return options[max_gamma]

    # -- learning ----------------------------------------------------------------------------------------------------

    def observe(self, plan: RoundPlan, requests: Sequence[Request], result: RoundResult) -> None:
        """See Controller.observe."""
        outcomes = iter(result.rows)
        tokens, decoding = 0, not plan.starts
        judged, ended = [], []
        for request, work in zip(requests, plan.work, strict=True):
            if work.new != 1 or not work.samples:
                decoding = False
            if not work.samples:
                continue
            outcome = next(outcomes)
            tokens += outcome.accepted + 1
            if outcome.drafted:
                judged.append((request.id, work.computed + 1, outcome.accepted, outcome.accepted < outcome.drafted))
            if request.finish_reason is not None:
                ended.append(request.id)
        self._acceptance.update(plan.budget, judged)
        for request_id in ended:
            self._acceptance.forget(request_id)
        self._acceptance.retain((request.id for request in requests), beyond=6 * len(requests) + 1000)
        decision, self._pending = self._pending, None
        if decision is None:
            return
        caught_up = sum([work.catch_up for work in plan.work])
        if decoding:
            self._observe_time(decision, plan, result, tokens, caught_up)
        else:
            # With prompts in the round the time of its drafts is unknown, so an exploration is charged as predicted.
            seconds = decision.chosen.seconds + self._catch_up.seconds(caught_up)
            self._charge(decision, decision.best.seconds, seconds, decision.chosen.tokens)

    def _observe_time(
        self, decision: _Decision, plan: RoundPlan, result: RoundResult, tokens: int, caught_up: int
    ) -> None:
        """Learn from the times of a round that only decoded."""
        batch, gammas = decision.batch, [work.gamma for work in plan.work]
        mean = sum(gammas) / batch.count
        predicted = batch.verify_seconds(self._times, [mean])[0]
        kind = "verify" if mean else "plain"
        where = verify_bucket(batch, self._times, round(mean))
        self._calibration.update(kind, where, result.verify_seconds, predicted)
        drafting = 0.0
        if mean:
            drafting = sum(batch.draft_seconds(self._times, plan.budget, rows) for rows in _rows_by_step(gammas))
        where = draft_bucket(batch, self._times, plan.budget)
        if caught_up:  # the time of the drafts alone is unknown
            drafting *= self._calibration.factor("draft", where)
            self._catch_up.record(caught_up, result.draft_seconds - drafting)
        elif mean:
            self._calibration.update("draft", where, result.draft_seconds, drafting)
        seconds = result.draft_seconds + result.verify_seconds
        self._charge(decision, seconds, seconds, tokens)
        plain, chosen = tokens / batch.count * decision.plain_s, decision.chosen
        self.report.decode_seconds += seconds
        self.report.plain_seconds += plain
        self.report.forecast_seconds += plain * (chosen.seconds / chosen.tokens) / (decision.plain_s / batch.count)
        self.report.alpha = self._acceptance.alpha(plan.budget)

    def _charge(self, decision: _Decision, earned: float, seconds: float, tokens: float) -> None:
        """Earn credit for explorations, a share of `earned` seconds, and pay for this round of `seconds` and `tokens`
        if it was one."""
        self._explore_credit = min(self._explore_credit + _EXPLORE * earned, 10 * earned)
        if decision.chosen is not decision.best:
            self._explore_credit -= max(0.0, seconds - tokens / decision.best.rate)


def _rows_by_step(gammas: Sequence[int]) -> list[int]:
    """Number of rows that take part in each draft step."""
    last = [0] * (max(gammas) + 1)
    for gamma in gammas:
        last[gamma] += 1
    return list(accumulate(last[:0:-1]))[::-1]
