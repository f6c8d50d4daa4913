"""The controller that decides when to speculate, and how much (MagicDec, arXiv 2408.11049, section 3).

A round is worth its tokens per second. Its time is predicted from the start-up profile, corrected by what rounds have
really taken; its tokens from each row's acceptance. Each round takes the gammas with the highest predicted rate; zero,
plain decoding, is always among them. Where drafts can read with several budgets, so is the budget chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from engine.control.acceptance import Estimates
from engine.control.calibration import Corrections
from engine.control.catch_up import CatchUp, is_late, nearest
from engine.control.goodput import Batch, Promises, Way, Ways, bucket
from engine.control.step_times import StepTimes
from engine.plan import StepPlan, StepResult
from engine.scheduler.controller import Report
from engine.scheduler.request import Request

_HYSTERESIS = 1.02
"""Another way to run rounds must promise this much more than the present one."""
_EXPLORE = 0.01
"""The share of time that may be lost to trying what is not thought best."""
_EXPLORE_EVERY = 16
"""Rounds between two tries, at least; and between two looks at other budgets."""


@dataclass(frozen=True, slots=True)
class _Decision:
    """About one round. best: what is thought best; chosen: that, or a try. plain_s: seconds of a plain round."""

    batch: Batch
    best: Way
    chosen: Way
    plain_s: float


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
        self._promises = Promises(times, self._corrections, self._estimates, gamma_max)
        self._catch_up = CatchUp()
        self._rounds = 0
        self._tries = 0
        self._tried_at = 0
        self._credit = 0.0  # seconds that trying may lose
        # The present way: what is thought best, for as long as nothing promises clearly more.
        self._cap, self._present = 0, self._budgets[0]
        self._under_way: _Decision | None = None
        self.budget = self._budgets[0]
        self.report = Report()

    @property
    def gamma_max(self) -> int:
        return self._gamma_max

    # -- choosing ----------------------------------------------------------------------------------------------------

    def choose(self, rows: Sequence[Request]) -> list[int]:
        """See Controller.choose."""
        self._rounds += 1
        batch = Batch.of(rows, self._gamma_max)
        ways = self._promises.ways(batch, self._present)
        if self._rounds % _EXPLORE_EVERY == 0:
            ways = self._look_at_budgets(batch, ways)
        drafting = batch
        if any(is_late(request) for request in rows):
            saved = 1 / ways.rates[0] - 1 / ways.rates.max()
            drafting = batch.limited(self._catch_up.worthwhile(rows, batch.limits, saved))
            ways = self._promises.ways(drafting, self._present)
        self._cap = self._stay(ways)
        best = ways[self._cap]
        chosen = self._try(drafting, batch, ways, best) or best
        self._under_way = _Decision(batch, best, chosen, float(ways.seconds[0]))
        self.budget = chosen.budget
        return chosen.gammas

    def _stay(self, ways: Ways) -> int:
        """The best cap, or the last one if that is about as good."""
        best, last = ways.best, min(self._cap, len(ways) - 1)
        return last if ways.rates[best] < _HYSTERESIS * ways.rates[last] else best

    def _look_at_budgets(self, batch: Batch, ways: Ways) -> Ways:
        """The ways with the budget that promises most."""
        best = ways.rates.max()
        for budget in self._budgets:
            others = self._promises.ways(batch, budget) if budget != self._present else ways
            if others.rates.max() > _HYSTERESIS * best:
                self._present, ways, best = budget, others, others.rates.max()
        return ways

    def _try(self, drafting: Batch, batch: Batch, ways: Ways, best: Way) -> Way | None:
        """Now and then, what is not thought best: drafts when they are off, none when they are on, another budget.

        Times that are not measured go stale, and a batch that should speculate again would not be noticed. Where a
        draft model has seen none of the rows, it is shown one, so many tokens with each try; what that takes is
        charged when it is known, and the next try waits until it is paid.
        """
        if self._rounds - self._tried_at < _EXPLORE_EVERY:
            return None
        turn = self._tries % len(self._budgets)
        self._tries += 1
        if turn:
            ways = self._promises.ways(
                drafting, [budget for budget in self._budgets if budget != self._present][turn - 1]
            )
        elif not drafting.limits.any():
            ways = self._promises.ways(batch.limited(nearest(batch.rows, batch.limits)), self._present)
        others = range(1, len(ways)) if turn or not any(best.gammas) else range(1)
        losses = {cap: float(ways.seconds[cap] - ways.tokens[cap] / best.rate) for cap in others}
        cap = min(losses, key=losses.__getitem__, default=0)
        if not losses or losses[cap] > self._credit:
            return None  # not to be afforded yet: the next turn's may be
        self._tried_at = self._rounds
        return ways[cap]

    # -- learning ----------------------------------------------------------------------------------------------------

    def observe(self, plan: StepPlan, requests: Sequence[Request], result: StepResult) -> None:
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
        self._estimates.judged(plan.budget, judged)
        for request_id in ended:
            self._estimates.forget(request_id)
        self._estimates.keep_only((request.id for request in requests), beyond=6 * len(requests) + 1000)
        decision, self._under_way = self._under_way, None
        if decision is None:
            return
        caught_up = sum([work.catch_up for work in plan.work])
        if decoding:
            self._timed(decision, plan, result, tokens, caught_up)
        else:
            # Prompts among them: nobody knows what the drafts took, so a try costs what it was thought to.
            seconds = decision.chosen.seconds + self._catch_up.seconds(caught_up)
            self._spend(decision, decision.best.seconds, seconds, decision.chosen.tokens)

    def _timed(self, decision: _Decision, plan: StepPlan, result: StepResult, tokens: int, caught_up: int) -> None:
        """A round that only decoded."""
        batch, gammas = decision.batch, [work.gamma for work in plan.work]
        mean = sum(gammas) / batch.count
        predicted = self._times.verify(batch.count, batch.total, [mean])[0]
        kind = "verify" if mean else "plain"
        self._corrections.observe(kind, bucket(batch, round(mean)), result.verify_seconds, predicted)
        drafting = 0.0
        if mean:
            read = batch.read(self._times, plan.budget)
            drafting = sum(self._times.draft(rows, read) for rows in _rows_by_step(gammas))
        where = bucket(batch, plan.budget)
        if caught_up:  # says nothing of how long drafts take
            drafting *= self._corrections.factor("draft", where)
            self._catch_up.observe(caught_up, result.draft_seconds - drafting)
        elif mean:
            self._corrections.observe("draft", where, result.draft_seconds, drafting)
        seconds = result.draft_seconds + result.verify_seconds
        self._spend(decision, seconds, seconds, tokens)
        plain, chosen = tokens / batch.count * decision.plain_s, decision.chosen
        self.report.decode_seconds += seconds
        self.report.plain_seconds += plain
        self.report.forecast_seconds += plain * (chosen.seconds / chosen.tokens) / (decision.plain_s / batch.count)
        self.report.alpha = self._estimates.overall(plan.budget)

    def _spend(self, decision: _Decision, earned: float, seconds: float, tokens: float) -> None:
        """A share of `earned` seconds may be lost to tries; a round of these seconds and tokens may have been one."""
        self._credit = min(self._credit + _EXPLORE * earned, 10 * earned)
        if decision.chosen is not decision.best:
            self._credit -= max(0.0, seconds - tokens / decision.best.rate)


def _rows_by_step(gammas: Sequence[int]) -> list[int]:
    """How many rows take part in each draft step."""
    last = [0] * (max(gammas) + 1)
    for gamma in gammas:
        last[gamma] += 1
    return list(accumulate(last[:0:-1]))[::-1]
