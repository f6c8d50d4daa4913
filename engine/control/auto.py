"""Controller that decides when to speculate, and how much (MagicDec, arXiv 2408.11049, section 3).

Each round runs the option with the highest predicted tokens per second (engine.control.goodput): gamma per row, what
its drafts read where a row may choose, and the budget where drafts can read with several. Plain decoding, gamma = 0, is
always an option. Predictions start from the profile and are corrected by the times and the acceptance of real rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from engine.control.acceptance import AcceptanceEstimates, Judged
from engine.control.calibration import Calibration
from engine.control.catch_up import CatchUp, only_smallest_lag
from engine.control.goodput import Batch, Goodput, Option, Options, draft_bucket, verify_bucket
from engine.control.step_times import StepTimes
from engine.control.text_acceptance import JudgedProposal, TextAcceptance
from engine.control.text_options import TextChooser
from engine.ngram.ngram_drafts import Proposal
from engine.plan import RoundPlan, RoundResult
from engine.scheduler.controller import ControllerReport, RowDrafts
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

    @property
    def proposals(self) -> dict[str, Proposal]:
        """What was found in the text, by request."""
        pairs = zip(self.batch.rows, self.batch.proposals, strict=False)
        return {row.id: proposal for row, proposal in pairs if proposal.tokens}


class AutoGamma:
    """Controller that chooses gamma per round and row. Host-side, O(rows × gamma_max)."""

    def __init__(
        self,
        times: StepTimes,
        gamma_max: int,
        budgets: Sequence[int],
        tokens_read: int | None = None,
        text_gamma_max: int = 0,
        *,
        reads_latest: bool = False,
    ) -> None:
        """times: of this engine. gamma_max, text_gamma_max: largest numbers of drafts per row that a model makes, and
        that come from the text alone; 0: none do. budgets: KV tokens per row that drafts may read, the largest first;
        (0,) if there is no choice. tokens_read: largest number that drafts read; None: the largest budget, or all
        tokens if that is 0. reads_latest: whether rows choose what drafts read, see RowWork.latest.
        """
        self._times = times
        self._model_gamma_max, self._gamma_max = gamma_max, max(gamma_max, text_gamma_max)
        self._budgets = tuple(budgets)
        self._calibration = Calibration()
        self._acceptance = AcceptanceEstimates(budgets[0], tokens_read or budgets[0])
        self._text, self._searches_text = TextAcceptance(), text_gamma_max > 0
        text = TextChooser(self._text, self._gamma_max, gamma_max) if text_gamma_max else None
        self._goodput = Goodput(
            times, self._calibration, self._acceptance, self._gamma_max, text, reads_latest=reads_latest
        )
        self._turns = len(self._budgets) + reads_latest  # kinds of explorations
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

    def begin_round(self) -> None:
        """See Controller.begin_round."""
        self._pending = None

    def choose(
        self, rows: Sequence[Request], shared_tokens: int = 0, proposals: Sequence[Proposal] = ()
    ) -> list[RowDrafts]:
        """See Controller.choose."""
        self._rounds += 1
        batch = Batch.from_requests(rows, self._model_gamma_max, shared_tokens, proposals)
        if self._searches_text:
            self._text.fade(row.id for row in rows)
        options = self._goodput.options(batch, self._current_budget)
        if self._rounds % _EXPLORE_EVERY == 0:
            options = self._compare_budgets(batch, options)
        drafting = batch
        if any(request.needs_catch_up for request in rows):
            saved = 1 / options.rates[0] - 1 / options.rates.max()
            drafting = batch.limited(self._catch_up.worthwhile(rows, batch.limits, saved))
            options = self._goodput.options(drafting, self._current_budget)
        self._max_gamma = self._stay(options)
        best = options[self._max_gamma]
        chosen = self._explore(drafting, batch, options, best) or best
        self._pending = _Decision(batch, best, chosen, options.plain_s)
        self.budget = chosen.budget
        return chosen.drafts

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
        are on, another budget, the other reading of each row.

        Times that are not measured go stale, and a batch that should speculate again would go undetected. Where a draft
        model lacks the tokens of all rows, it catches up on one row, a part with each exploration. This time is charged
        when it is known, and the next exploration waits until the credit covers it.
        """
        if self._rounds - self._explored_at < _EXPLORE_EVERY:
            return None
        turn = self._explorations % self._turns
        self._explorations += 1
        if self._tries_plain(best, options) and not turn:
            candidates = [options.plain]
        else:
            candidates = self._other_options(drafting, batch, options, turn)
        losses = [each.seconds - each.tokens / best.rate for each in candidates]
        if not losses or min(losses) > self._explore_credit:
            return None  # too expensive for now; the next option may not be
        self._explored_at = self._rounds
        return candidates[losses.index(min(losses))]

    def _tries_plain(self, best: Option, options: Options) -> bool:
        """Whether an exploration is a plain round: where a model drafts, and by turns where only text is drafted."""
        if any(drafts.model for drafts in best.drafts):
            return True
        from_text = any(drafts.proposed for drafts in best.drafts)
        return from_text and (len(options) == 1 or self._explorations // self._turns % 2 == 0)

    def _other_options(self, drafting: Batch, batch: Batch, options: Options, turn: int) -> list[Option]:
        """Return options in which a model drafts: with another budget or the other readings, if it is their turn."""
        if turn == len(self._budgets):
            options = self._goodput.options(drafting, self._current_budget, worse=True)
        elif turn:
            options = self._goodput.options(
                drafting, [budget for budget in self._budgets if budget != self._current_budget][turn - 1]
            )
        elif batch.limits.any() and not drafting.limits.any():
            options = self._goodput.options(
                batch.limited(only_smallest_lag(batch.rows, batch.limits)), self._current_budget
            )
        return [options[max_gamma] for max_gamma in range(1, len(options))]

    # -- learning ----------------------------------------------------------------------------------------------------

    def observe(self, plan: RoundPlan, requests: Sequence[Request], result: RoundResult) -> None:
        """See Controller.observe."""
        outcomes = iter(result.rows)
        tokens = 0
        judged, from_text, ended = [], [], []
        proposals = self._pending.proposals if self._pending is not None else {}
        for request, work in zip(requests, plan.work, strict=True):
            if not work.samples:
                continue
            outcome = next(outcomes)
            tokens += outcome.accepted + 1
            proposed, accepted = len(work.proposed), outcome.accepted
            if proposal := proposals.get(request.id):
                from_text.append(_judge(request.id, proposal, outcome.tokens))
            if work.model_drafts and accepted >= proposed:
                rejected = accepted < outcome.drafted
                judged.append(Judged(request.id, work.computed + 1, accepted - proposed, rejected, work.latest))
            if request.finish_reason is not None:
                ended.append(request.id)
        self._acceptance.update(plan.budget, judged)
        self._text.update(from_text)
        for estimates in (self._acceptance, self._text):
            for request_id in ended:
                estimates.forget(request_id)
            estimates.retain((request.id for request in requests), beyond=6 * len(requests) + 1000)
        decision, self._pending = self._pending, None
        if decision is None:
            return
        caught_up = sum([work.catch_up for work in plan.work])
        if len(plan.work) == decision.batch.count:  # all of them are decoding rows, none of which is ever left out
            self._observe_time(decision, plan, result, tokens, caught_up)
        else:
            # With prompts in the round the time of its drafts is unknown, so an exploration is charged as predicted.
            seconds = decision.chosen.seconds + self._catch_up.seconds(caught_up)
            self._charge(decision, decision.best.seconds, seconds, decision.chosen.tokens)

    def _observe_time(
        self, decision: _Decision, plan: RoundPlan, result: RoundResult, tokens: int, caught_up: int
    ) -> None:
        """Learn from the times of a round that only decoded."""
        batch, steps = decision.batch, [work.model_drafts for work in plan.work]
        mean = sum([work.gamma for work in plan.work]) / batch.count
        predicted = batch.verify_seconds(self._times, [mean])[0]
        kind = "verify" if mean else "plain"
        where = verify_bucket(batch, self._times, max(1, round(mean)) if mean else 0)
        self._calibration.update(kind, where, result.verify_seconds, predicted)
        drafting = sum([batch.draft_seconds(self._times, plan.budget, rows) for rows in _rows_by_step(steps)])
        where = draft_bucket(batch, self._times, plan.budget)
        mixed = any(work.proposed and work.model_drafts for work in plan.work)
        if caught_up:  # the time of the drafts alone is unknown
            drafting *= self._calibration.factor("draft", where)
            self._catch_up.record(caught_up, result.draft_seconds - drafting)
        elif drafting and not mixed:  # else the model has computed drafts from the text too
            self._calibration.update("draft", where, result.draft_seconds, drafting)
        seconds = result.draft_seconds + result.verify_seconds
        self._charge(decision, seconds, seconds, tokens)
        plain, chosen = tokens / batch.count * decision.plain_s, decision.chosen
        self.report.decode_seconds += seconds
        self.report.plain_seconds += plain
        self.report.forecast_seconds += plain * (chosen.seconds / chosen.tokens) / (decision.plain_s / batch.count)
        if self._model_gamma_max:
            self.report.alpha = self._acceptance.mean(plan.budget)

    def _charge(self, decision: _Decision, earned: float, seconds: float, tokens: float) -> None:
        """Earn credit for explorations, a share of `earned` seconds, and pay for this round of `seconds` and `tokens`
        if it was one."""
        self._explore_credit = min(self._explore_credit + _EXPLORE * earned, 10 * earned)
        if decision.chosen is not decision.best:
            self._explore_credit -= max(0.0, seconds - tokens / decision.best.rate)


def _judge(request: str, proposal: Proposal, tokens: Sequence[int]) -> JudgedProposal:
    """Judge a proposal by the tokens that followed, drafted or not."""
    same = [ours == theirs for ours, theirs in zip(proposal.tokens, tokens, strict=False)]
    return JudgedProposal(request, proposal.match, same.index(False) if False in same else len(same), False in same)


def _rows_by_step(steps: Sequence[int]) -> list[int]:
    """Number of rows that take part in each draft step. steps: of each row."""
    last = [0] * (max(steps) + 1)
    for count in steps:
        last[count] += 1
    return list(accumulate(last[:0:-1]))[::-1]
