"""Controller that decides when to speculate, and how much (MagicDec, arXiv 2408.11049, section 3).

Each round runs the option with the highest predicted tokens per second, as they count (engine.control.goodput): gamma
per row, what its drafts read where a row may choose, and the way to draft, which is a model and a budget, where there
are several. Plain decoding, gamma = 0, is always an option. Predictions start from the profile and are corrected by the
times and the acceptance of real rounds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from engine.control.acceptance import AcceptanceEstimates, Judged
from engine.control.calibration import Calibration
from engine.control.candidates import Candidates
from engine.control.catch_up import CatchUp
from engine.control.drafting_model import DraftingModel
from engine.control.goodput import Batch, Goodput, Option, Options, draft_bucket, draft_kind, verify_bucket
from engine.control.text_acceptance import JudgedProposal, TextAcceptance
from engine.control.text_options import TextChooser
from engine.control.text_outlook import COPY, Advance, TextOutlook
from engine.ngram.ngram_drafts import Proposal
from engine.plan import RoundPlan, RoundResult
from engine.scheduler.controller import ControllerReport, RowDrafts, Way
from engine.scheduler.request import Request

_HYSTERESIS = 1.02
"""Factor by which another option's predicted throughput must exceed the current one's."""
_EXPLORE = 0.01
"""Share of time that may be lost to exploring options that are not predicted to be best."""
_EXPLORE_EVERY = 16
"""Smallest number of rounds between two explorations, and between two comparisons of ways."""


@dataclass(frozen=True, slots=True)
class _Decision:
    """Decision for one round. best: the option predicted to be best. chosen: that one, or an exploration. plain_s:
    predicted seconds of a plain round. cannot_copy: requests that may not have as many drafts as a copy has."""

    batch: Batch
    best: Option
    chosen: Option
    plain_s: float
    cannot_copy: frozenset[str]

    @property
    def proposals(self) -> dict[str, Proposal]:
        """What was found in the text, by request."""
        pairs = zip(self.batch.rows, self.batch.proposals, strict=False)
        return {row.id: proposal for row, proposal in pairs if proposal.tokens}


class AutoGamma:
    """Controller that chooses gamma per round and row. Host-side, O(rows × gamma_max)."""

    def __init__(self, models: Sequence[DraftingModel], gamma_max: int, text_gamma_max: int = 0) -> None:
        """models: those that a round's drafts may come from; the times of the first one's target are used without
        drafts, too. gamma_max, text_gamma_max: largest numbers of drafts per row that a model makes, and that come from
        the text alone; 0: none do.
        """
        self._times = models[0].times
        self._model_gamma_max, self._gamma_max = gamma_max, max(gamma_max, text_gamma_max)
        self._calibration = Calibration()
        self._text, self.takes_text = TextAcceptance(), text_gamma_max > 0
        self._outlook = TextOutlook()
        text = (TextChooser(self._text, self._gamma_max, gamma_max), self._outlook) if text_gamma_max else ()
        self._goodput = {model.name: Goodput(model, self._calibration, self._gamma_max, *text) for model in models}
        self._by_request: list[AcceptanceEstimates | TextAcceptance | TextOutlook] = [self._text, self._outlook]
        self._by_request += [model.acceptance for model in models]
        self._ways = [Way(budget, model.name) for model in models for budget in model.budgets]
        self._catch_up = CatchUp()
        self._rounds = 0
        self._explorations = 0
        self._explored_at = 0
        self._explore_credit = 0.0  # seconds that explorations may lose
        # The current option; kept until another one is predicted to be clearly faster.
        self._max_gamma, self._current = 0, self._ways[0]
        self._pending: _Decision | None = None
        self.way = self._current
        self.report = ControllerReport()

    @property
    def gamma_max(self) -> int:
        return self._gamma_max

    # -- choosing ----------------------------------------------------------------------------------------------------

    def begin_round(self) -> None:
        """See Controller.begin_round."""
        self._pending = None

    def choose(
        self,
        rows: Sequence[Request],
        shared_tokens: int = 0,
        proposals: Sequence[Proposal] = (),
        share: int | None = None,
    ) -> list[RowDrafts]:
        """See Controller.choose."""
        self._rounds += 1
        batch = Batch.from_requests(rows, self._model_gamma_max, shared_tokens, proposals, share)
        if self.takes_text:
            self._text.fade(row.id for row in rows)
        candidates = Candidates(batch, self._goodput, self._ways, self._catch_up)
        current = candidates[self._current]
        if self._rounds % _EXPLORE_EVERY == 0 or (current.lags and current.would_draft):
            self._current = self._compare(candidates)
        options = candidates[self._current].options
        self._max_gamma = self._stay(options)
        best = options[self._max_gamma]
        chosen = self._explore(candidates, best) or best
        cannot_copy = self._cannot_copy(rows, share) if self.takes_text else frozenset()
        self._pending = _Decision(batch, best, chosen, options.plain_s, cannot_copy)
        self.way = chosen.way
        return chosen.drafts

    @staticmethod
    def _cannot_copy(rows: Sequence[Request], share: int | None) -> frozenset[str]:
        """See _Decision. share: see Controller.choose."""
        all_rows = share is not None and share < COPY
        return frozenset(row.id for row in rows if all_rows or row.max_draft_tokens < COPY)

    def _stay(self, options: Options) -> int:
        """Return the best max_gamma, or the current one if that is about as good."""
        best, last = options.best, min(self._max_gamma, len(options) - 1)
        return last if options.rates[best] < _HYSTERESIS * options.rates[last] else best

    def _compare(self, candidates: Candidates) -> Way:
        """Return the way of the highest predicted throughput, or the current one if that is about as good."""
        best = candidates[self._current]
        for way in self._ways:
            if way != self._current and candidates[way].rate > _HYSTERESIS * best.rate:
                best = candidates[way]
        return best.way

    def _explore(self, candidates: Candidates, best: Option) -> Option | None:
        """Return, at intervals, an option that is not predicted to be best: drafts when they are off, none when they
        are on, another way, the other reading of each row.

        Times that are not measured go stale, and a batch that should speculate again would go undetected. Where a draft
        model lacks the tokens of all rows, it catches up on one row, a part with each exploration. This time is charged
        when it is known, and the next exploration waits until the credit covers it.
        """
        if self._rounds - self._explored_at < _EXPLORE_EVERY:
            return None
        turns = len(self._ways) + self._goodput[self._current.drafter].model.reads_latest  # kinds of explorations
        turn = self._explorations % turns
        self._explorations += 1
        current = candidates[self._current].options
        if not turn and self._tries_plain(best, current, self._explorations // turns):
            tried = [current.plain]
        else:
            options = self._other_options(candidates, turn)
            tried = [options[max_gamma] for max_gamma in range(1, len(options))]
        losses = [each.seconds - each.worth / best.rate for each in tried]
        if not losses or min(losses) > self._explore_credit:
            return None  # too expensive for now; the next option may not be
        self._explored_at = self._rounds
        return tried[losses.index(min(losses))]

    @staticmethod
    def _tries_plain(best: Option, options: Options, number: int) -> bool:
        """Whether an exploration is a plain round: where a model drafts, and by turns where only text is drafted.
        number: of explorations of this kind."""
        if any(drafts.model for drafts in best.drafts):
            return True
        from_text = any(drafts.proposed for drafts in best.drafts)
        return from_text and (len(options) == 1 or number % 2 == 0)

    def _other_options(self, candidates: Candidates, turn: int) -> Options:
        """Return options in which a model drafts: in another way or with the other readings, if it is their turn."""
        if turn == len(self._ways):
            return candidates.with_other_readings(candidates[self._current])
        others = [way for way in self._ways if way != self._current]
        candidate = candidates[others[turn - 1] if turn else self._current]
        return candidates.with_one_row(candidate.way) if candidate.lags else candidate.options

    # -- learning ----------------------------------------------------------------------------------------------------

    def observe(self, plan: RoundPlan, requests: Sequence[Request], result: RoundResult) -> None:
        """See Controller.observe."""
        decision, self._pending = self._pending, None
        outcomes = iter(result.rows)
        tokens = 0
        judged, from_text, advances = [], [], []
        # Nobody reports a request that was aborted, and another may have its id.
        self._forget(request.id for request in requests if request.num_output == 1)
        proposals = decision.proposals if decision is not None else {}
        cannot_copy = decision.cannot_copy if decision is not None else frozenset()
        # An exploration in the middle of a copy is no wait for one.
        waits = self.takes_text and (decision is None or decision.chosen is decision.best)
        for request, work in zip(requests, plan.work, strict=True):
            if not work.samples:
                continue
            outcome = next(outcomes)
            tokens += outcome.accepted + 1
            proposed, accepted = len(work.proposed), outcome.accepted
            if waits and request.id not in cannot_copy:
                advances.append(Advance(request.id, proposed, min(proposed, accepted), accepted + 1))
            if proposal := proposals.get(request.id):
                from_text.append(_judge(request.id, proposal, outcome.tokens))
            if work.model_drafts and accepted >= proposed:
                rejected = accepted < outcome.drafted
                judged.append(Judged(request.id, work.computed + 1, accepted - proposed, rejected, work.latest))
        self._goodput[plan.drafter].model.acceptance.update(plan.budget, judged)
        self._text.update(from_text)
        self._outlook.update(advances)
        self._forget(request.id for request in requests if request.finish_reason is not None)
        for estimates in self._by_request:
            estimates.retain((request.id for request in requests), beyond=6 * len(requests) + 1000)
        if decision is None:
            return
        caught_up = sum([work.catch_up for work in plan.work])
        if len(plan.work) == decision.batch.count:  # all of them are decoding rows, none of which is ever left out
            self._observe_time(decision, plan, result, tokens, caught_up)
        else:
            # With prompts in the round the time of its drafts is unknown, so an exploration is charged as predicted.
            seconds = decision.chosen.seconds + self._catch_up.seconds(caught_up)
            self._charge(decision, decision.best.seconds, seconds, decision.chosen.tokens)

    def _forget(self, requests: Iterable[str]) -> None:
        """Drop the records of these requests."""
        for request in requests:
            for estimates in self._by_request:
                estimates.forget(request)

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
        model, drafts = self._goodput[plan.drafter].model, draft_kind(plan.drafter)
        drafting = sum([batch.draft_seconds(model.times, plan.budget, rows) for rows in _rows_by_step(steps)])
        where = draft_bucket(batch, model.times, plan.budget)
        mixed = any(work.proposed and work.model_drafts for work in plan.work)
        if caught_up:  # the time of the drafts alone is unknown
            drafting *= self._calibration.factor(drafts, where)
            self._catch_up.record(caught_up, result.draft_seconds - drafting)
        elif drafting and not mixed:  # else the model has computed drafts from the text too
            self._calibration.update(drafts, where, result.draft_seconds, drafting)
        seconds = result.draft_seconds + result.verify_seconds
        self._charge(decision, seconds, seconds, tokens)
        plain, chosen = tokens / batch.count * decision.plain_s, decision.chosen
        self.report.decode_seconds += seconds
        self.report.plain_seconds += plain
        self.report.forecast_seconds += plain * (chosen.seconds / chosen.tokens) / (decision.plain_s / batch.count)
        if self._model_gamma_max:
            self.report.alpha = model.acceptance.mean(plan.budget)

    def _charge(self, decision: _Decision, earned: float, seconds: float, tokens: float) -> None:
        """Earn credit for explorations, a share of `earned` seconds, and pay for this round of `seconds` and `tokens`
        if it was one."""
        self._explore_credit = min(self._explore_credit + _EXPLORE * earned, 10 * earned)
        if decision.chosen is not decision.best:
            worth = tokens * decision.chosen.worth / decision.chosen.tokens
            self._explore_credit -= max(0.0, seconds - worth / decision.best.rate)


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
