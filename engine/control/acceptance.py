"""Acceptance as it is met: of each request, and of requests like it, for each budget that drafts have read with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_START_ALPHA, _START_TRIALS = 0.9, 10.0
"""What is expected before anything was drafted, and how many judged tokens that is worth. Rather too much than too
little: what is drafted is soon known, and what is not drafted never."""
_REQUEST_TRIALS = 8.0
"""A request's own record weighs as much as the prior after so many judged tokens."""
_REQUEST_MEMORY, _PRIOR_MEMORY = 100.0, 500.0
"""Judged tokens that a request's record, and each prior, remember."""
_BUDGET_EXPONENT = 0.5
"""Where a budget has not been tried, rejections are taken to fall with this power of it."""


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


class Estimates:
    """Three levels, each the prior of the next: a budget; rows whose contexts are about as many budgets long; one
    request. So a new request starts with what others have shown."""

    def __init__(self, budget: int, reads: int) -> None:
        """budget: the largest one, by the name that rounds know it by. reads: KV tokens that drafts read with it per
        row; 0 if they read everything."""
        self._budget = budget
        self._reads = reads
        self._overall: dict[int, Record] = {}
        self._priors: dict[tuple[int, int], Record] = {}
        self._requests: dict[tuple[str, int], Record] = {}

    def overall(self, budget: int) -> float:
        """Probability that a drafted token holds, given that those before it did."""
        expected = _START_ALPHA
        if budget != self._budget:
            expected = 1 - (1 - self.overall(self._budget)) * (self._budget / budget) ** _BUDGET_EXPONENT
        record = self._overall.get(budget)
        return record.alpha(max(0.0, expected), _START_TRIALS) if record else max(0.0, expected)

    def alphas(self, requests: Sequence[str], contexts: Sequence[int], budget: int) -> list[float]:
        """The same of each request."""
        overall = self.overall(budget)
        priors: dict[int, float] = {}
        found = []
        for request, context in zip(requests, contexts, strict=True):
            likeness = self._likeness(context)
            if likeness not in priors:
                prior = self._priors.get((budget, likeness))
                priors[likeness] = prior.alpha(overall, _START_TRIALS) if prior else overall
            record = self._requests.get((request, budget))
            found.append(record.alpha(priors[likeness], _REQUEST_TRIALS) if record else priors[likeness])
        return found

    def judged(self, budget: int, rows: Iterable[tuple[str, int, int, bool]]) -> None:
        """A round's drafts with this budget. rows: of each that drafted its request, its context, how many drafts held,
        and whether the one behind them did not, rather than there being none."""
        sums: dict[int, list[int]] = {}
        for request, context, held, rejected in rows:
            own = self._requests.get((request, budget))
            if own is None:
                own = self._requests[request, budget] = Record()
            own.add(held, rejected, _REQUEST_MEMORY)
            like = sums.setdefault(self._likeness(context), [0, 0])
            like[0] += held
            like[1] += rejected
        for likeness, (held, rejections) in sums.items():
            prior = self._priors.setdefault((budget, likeness), Record())
            for record in (prior, self._overall.setdefault(budget, Record())):
                record.add(held, rejections, _PRIOR_MEMORY)

    def forget(self, request: str) -> None:
        for budget in self._overall:
            self._requests.pop((request, budget), None)

    def keep_only(self, requests: Iterable[str], beyond: int) -> None:
        """Forget all other requests, once there are more than `beyond` records: some end without a word."""
        if len(self._requests) > beyond:
            kept = set(requests)
            self._requests = {key: record for key, record in self._requests.items() if key[0] in kept}

    def _likeness(self, context: int) -> int:
        return (context // self._reads).bit_length() if self._reads else 0
