"""The controller that decides when to speculate, and how much (MagicDec, arXiv 2408.11049, section 3).

A round is worth its tokens per second. Its time is predicted from the start-up profile, corrected by what rounds have
really taken; its tokens from each row's acceptance. Each round takes the gammas with the highest predicted rate; zero,
plain decoding, is always among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.plan import StepPlan, StepResult
from engine.request import Request
from engine.speculation.controller import Report
from engine.speculation.corrections import Corrections
from engine.speculation.cost_model import expected_tokens
from engine.speculation.step_times import StepTimes

_HYSTERESIS = 1.02
"""A new most-gamma must promise this much more than the last one."""
_EXPLORE = 0.01
"""The share of time that may be lost to trying what is not thought best."""
_EXPLORE_EVERY = 16
"""Rounds between two tries, at least."""
_PRIOR_TRIALS = 8.0
"""A request's own record weighs as much as the prior after so many drafted tokens were judged."""
_REQUEST_MEMORY, _PRIOR_MEMORY = 100.0, 500.0
"""Judged tokens that a request's estimate, and each prior, remember."""
_START_ALPHA, _START_TRIALS = 0.8, 10.0


@dataclass(slots=True)
class Record:
    """Drafted tokens that were judged, and how many of them held; older ones fade."""

    held: float = 0.0
    judged: float = 0.0

    def add(self, held: int, rejected: int, memory: float) -> None:
        """The truncated geometric estimate: a round's drafts are judged up to the first that fails."""
        fade = max(0.0, 1 - (held + rejected) / memory)
        self.held = self.held * fade + held
        self.judged = self.judged * fade + held + rejected

    def alpha(self, prior: float, trials: float) -> float:
        """The share that held, where `trials` more were judged as the prior says."""
        return (self.held + prior * trials) / (self.judged + trials)


@dataclass(frozen=True, slots=True)
class _Choice:
    """A way to run a round, and what it promises. seconds and tokens: of the whole batch."""

    gammas: list[int]
    seconds: float
    tokens: float

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


class AutoGamma:
    """Chooses per round and per row. Host-side, O(rows × gamma_max)."""

    def __init__(self, times: StepTimes, gamma_max: int, budget: int | None) -> None:
        """times: of this engine. budget: KV tokens that a draft reads per row; rows whose contexts are about as many
        times longer share what was learnt of acceptance. None: it reads all.
        """
        self._times = times
        self._gamma_max = gamma_max
        self._budget = budget
        self._corrections = Corrections()
        self._requests: dict[str, Record] = {}
        self._overall = Record(_START_ALPHA * _START_TRIALS, _START_TRIALS)
        self._priors: dict[int, Record] = {}
        self._cap = 0
        self._since_try = 0
        self._credit = 0.0  # seconds that trying may lose
        self._trying = False
        self._best: _Choice | None = None
        self._chosen: _Choice | None = None
        self._plain_s = 0.0
        self.report = Report()

    @property
    def gamma_max(self) -> int:
        return self._gamma_max

    # -- choosing ----------------------------------------------------------------------------------------------------

    def choose(self, rows: Sequence[Request]) -> list[int]:
        """See Controller.choose."""
        choices = self._choices(rows)
        best = max(range(len(choices)), key=lambda cap: choices[cap].rate)
        last = min(self._cap, len(choices) - 1)
        if choices[best].rate < _HYSTERESIS * choices[last].rate:
            best = last
        self._cap = best
        self._best, self._plain_s = choices[best], choices[0].seconds
        self._chosen = self._try(choices, best) or choices[best]
        self._trying = self._chosen is not choices[best]
        return self._chosen.gammas

    def _try(self, choices: Sequence[_Choice], best: int) -> _Choice | None:
        """Now and then, what is not thought best: drafts when they are off, none when they are on. Times that are not
        measured go stale, and a batch that should speculate again would not be noticed."""
        self._since_try += 1
        others = choices[1:] if best == 0 else choices[:1]
        if self._since_try < _EXPLORE_EVERY or not others:
            return None
        losses = [choice.seconds - choice.tokens / choices[best].rate for choice in others]
        least = min(losses)
        if least > self._credit:
            return None
        self._since_try = 0
        return others[losses.index(least)]

    def _choices(self, rows: Sequence[Request]) -> list[_Choice]:
        """The best way with at most so many drafts per row, by that number; [0] is plain decoding."""
        count, total = len(rows), sum(request.num_tokens for request in rows)
        contexts = [request.num_tokens for request in rows]
        limits = [min(self._gamma_max, request.most_drafts) for request in rows]
        alphas = [self._alpha(request) for request in rows]
        plain = self._times.verify(count, total, 0) * self._factor("plain", count, total, 0)
        verify = [plain] + [
            self._times.verify(count, total, gamma) * self._factor("verify", count, total, gamma)
            for gamma in range(1, self._gamma_max + 1)
        ]
        factor = self._factor("draft", count, total, 0)
        one, all_rows = (factor * self._times.draft(n, contexts) for n in (1, count))
        per_row = (all_rows - one) / (count - 1) if count > 1 else 0.0

        def choice(gammas: list[int]) -> _Choice:
            mean = sum(gammas) / count
            low = min(int(mean), self._gamma_max - 1)
            seconds = verify[low] + (verify[low + 1] - verify[low]) * (mean - low)
            for step in range(max(gammas)):
                seconds += one + per_row * (sum(gamma > step for gamma in gammas) - 1)
            tokens = sum(expected_tokens(gamma, alpha) for gamma, alpha in zip(gammas, alphas, strict=True))
            return _Choice(gammas, seconds, tokens)

        choices = [_Choice([0] * count, plain, float(count))]
        for cap in range(1, min(self._gamma_max, max(limits, default=0)) + 1):
            even = choice([min(cap, limit) for limit in limits])
            # A row's next draft has to bring more than the time it takes would bring elsewhere.
            price = even.rate * ((verify[cap] - verify[cap - 1]) / count + per_row)
            worth = [_worthwhile(alpha, price, limit) for alpha, limit in zip(alphas, even.gammas, strict=True)]
            trimmed = choice(worth) if any(worth) and worth != even.gammas else even
            choices.append(max(even, trimmed, key=lambda choice: choice.rate))
        return choices

    def _alpha(self, request: Request) -> float:
        overall = self._overall.alpha(_START_ALPHA, 0.0)
        prior = self._priors.get(self._likeness(request.num_tokens))
        expected = prior.alpha(overall, _START_TRIALS) if prior else overall
        record = self._requests.get(request.id)
        return record.alpha(expected, _PRIOR_TRIALS) if record else expected

    def _likeness(self, context: int) -> int:
        """Rows of about as many budgets share a prior."""
        return (context // self._budget).bit_length() if self._budget else 0

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
                self._judged(request, work.computed + 1, outcome.accepted, outcome.accepted < outcome.drafted)
            if request.finish_reason is not None:
                self._requests.pop(request.id, None)
        if len(self._requests) > 2 * len(requests) + 1000:  # of requests that were aborted
            here = {request.id for request in requests}
            self._requests = {id: record for id, record in self._requests.items() if id in here}
        decoding = all(work.new == 1 and work.samples for work in plan.work) and not plan.starts
        if decoding and self._chosen is not None and self._best is not None:
            self._timed(plan, result, tokens, self._chosen, self._best)
        self._chosen = None

    def _judged(self, request: Request, context: int, held: int, rejected: bool) -> None:
        record = self._requests.setdefault(request.id, Record())
        prior = self._priors.setdefault(self._likeness(context), Record())
        for known, memory in ((record, _REQUEST_MEMORY), (prior, _PRIOR_MEMORY), (self._overall, _PRIOR_MEMORY)):
            known.add(held, int(rejected), memory)

    def _timed(self, plan: StepPlan, result: StepResult, tokens: int, chosen: _Choice, best: _Choice) -> None:
        gammas = [work.gamma for work in plan.work]
        contexts = [work.computed + 1 for work in plan.work]
        count, total, mean = len(gammas), sum(contexts), sum(gammas) / len(gammas)
        predicted = self._times.verify(count, total, mean)
        kind = "verify" if mean else "plain"
        self._corrections.observe(kind, _bucket(count, total, round(mean)), result.verify_seconds, predicted)
        if mean:
            steps = [sum(gamma > step for gamma in gammas) for step in range(max(gammas))]
            predicted = sum(self._times.draft(rows, contexts) for rows in steps)
            self._corrections.observe("draft", _bucket(count, total, 0), result.draft_seconds, predicted)
        seconds = result.draft_seconds + result.verify_seconds
        self._credit = min(self._credit + _EXPLORE * seconds, 10 * seconds)
        if self._trying:
            self._credit -= max(0.0, seconds - tokens / best.rate)
        plain = tokens / count * self._plain_s
        self.report.decode_seconds += seconds
        self.report.plain_seconds += plain
        self.report.forecast_seconds += plain * (chosen.seconds / chosen.tokens) / (self._plain_s / count)
        self.report.alpha = self._overall.alpha(_START_ALPHA, 0.0)

    def _factor(self, kind: str, rows: int, total: int, gamma: int) -> float:
        return self._corrections.factor(kind, _bucket(rows, total, gamma))


def _bucket(rows: int, total: int, gamma: int) -> tuple[int, int, int]:
    return rows.bit_length(), total.bit_length(), gamma


def _worthwhile(alpha: float, price: float, limit: int) -> int:
    """The most drafts of which each is worth `price` tokens: draft s holds with probability alpha^s."""
    gamma, worth = 0, alpha
    while gamma < limit and worth >= price:
        gamma += 1
        worth *= alpha
    return gamma
