"""Online acceptance estimates: of each request, and of similar requests, for each reading of drafts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

_START_ALPHA, _START_TRIALS = 0.9, 10.0
"""Prior before anything was drafted, and its weight in judged tokens. Optimistic: over-drafting corrects itself,
under-drafting is never observed."""
_REQUEST_TRIALS = 8.0
"""Number of judged tokens after which a request's own record weighs as much as its prior."""
_REQUEST_MEMORY, _PRIOR_MEMORY = 100.0, 500.0
"""Number of judged tokens that a request's record, and each prior, retain."""
_BUDGET_EXPONENT = 0.5
"""Power of the budget with which rejections are assumed to fall, for an untried budget."""


@dataclass(slots=True)
class AcceptanceRecord:
    """Number of judged drafts, and of accepted ones; older ones fade."""

    accepted: float = 0.0
    judged: float = 0.0

    def add(self, accepted: int, rejected: int, memory: float) -> None:
        """Add one round, whose drafts are judged up to the first rejection (the truncated geometric estimate)."""
        fade = max(0.0, 1 - (accepted + rejected) / memory)
        self.accepted = self.accepted * fade + accepted
        self.judged = self.judged * fade + accepted + rejected

    def fade(self, kept: float) -> None:
        """Keep a share of the record."""
        self.accepted *= kept
        self.judged *= kept

    def alpha(self, prior: float, trials: float) -> float:
        """Compute the share of accepted drafts, after `trials` further ones as the prior predicts."""
        return (self.accepted + prior * trials) / (self.judged + trials)


_T = TypeVar("_T")


class RequestRecords(Generic[_T]):
    """Base of estimates that keep one record of each request, by its id."""

    def __init__(self) -> None:
        self._requests: dict[str, _T] = {}

    def forget(self, request: str) -> None:
        self._requests.pop(request, None)

    def retain(self, requests: Iterable[str], beyond: int) -> None:
        """See AcceptanceEstimates.retain."""
        if len(self._requests) > beyond:
            kept = set(requests)
            self._requests = {key: record for key, record in self._requests.items() if key in kept}


class Reading(NamedTuple):
    """What drafts of a row read. budget: KV tokens. latest: see RowWork."""

    budget: int
    latest: bool = False


class Judged(NamedTuple):
    """Drafts of a row in a round. accepted: number of them before the first rejection. rejected: whether there was
    one."""

    request: str
    context: int
    accepted: int
    rejected: bool
    latest: bool = False


class AcceptanceEstimates:
    """Acceptance at three levels, each the prior of the next: a reading; rows whose contexts are about as many budgets
    long; one request. A new request thus starts from the record of others."""

    def __init__(self, budget: int, reads: int) -> None:
        """budget: the largest one, as in plans. reads: KV tokens that drafts read with it per row; 0: all."""
        self._budget = budget
        self._reads = reads
        self._overall: dict[Reading, AcceptanceRecord] = {}
        self._priors: dict[tuple[Reading, int], AcceptanceRecord] = {}
        self._requests: dict[tuple[str, Reading], AcceptanceRecord] = {}

    def alpha(self, reading: Reading) -> float:
        """Estimate the probability that a draft is accepted, given that those before it were."""
        budget, expected = reading.budget, _START_ALPHA
        if budget != self._budget:
            widest = self.alpha(reading._replace(budget=self._budget))
            expected = 1 - (1 - widest) * (self._budget / budget) ** _BUDGET_EXPONENT
        record = self._overall.get(reading)
        return record.alpha(max(0.0, expected), _START_TRIALS) if record else max(0.0, expected)

    def mean(self, budget: int) -> float:
        """Return the mean of `alpha` with a budget, by the number of drafts that were judged with each reading."""
        readings = [reading for reading in (Reading(budget), Reading(budget, latest=True)) if reading in self._overall]
        judged = sum(self._overall[reading].judged for reading in readings)
        if not judged:
            return self.alpha(Reading(budget))
        return sum(self.alpha(reading) * self._overall[reading].judged for reading in readings) / judged

    def alphas(self, requests: Sequence[str], contexts: Sequence[int], reading: Reading) -> list[float]:
        """Return `alpha` of each request."""
        alpha = self.alpha(reading)
        priors: dict[int, float] = {}
        found = []
        for request, context in zip(requests, contexts, strict=True):
            context_bucket = self._context_bucket(context)
            if context_bucket not in priors:
                prior = self._priors.get((reading, context_bucket))
                priors[context_bucket] = prior.alpha(alpha, _START_TRIALS) if prior else alpha
            record = self._requests.get((request, reading))
            found.append(record.alpha(priors[context_bucket], _REQUEST_TRIALS) if record else priors[context_bucket])
        return found

    def update(self, budget: int, rows: Iterable[Judged]) -> None:
        """Learn from a round's drafts with this budget."""
        sums: dict[tuple[Reading, int], list[int]] = {}
        for row in rows:
            reading = Reading(budget, row.latest)
            own = self._requests.get((row.request, reading))
            if own is None:
                own = self._requests[row.request, reading] = AcceptanceRecord()
            own.add(row.accepted, row.rejected, _REQUEST_MEMORY)
            similar = sums.setdefault((reading, self._context_bucket(row.context)), [0, 0])
            similar[0] += row.accepted
            similar[1] += row.rejected
        for (reading, context_bucket), (accepted, rejections) in sums.items():
            prior = self._priors.setdefault((reading, context_bucket), AcceptanceRecord())
            for record in (prior, self._overall.setdefault(reading, AcceptanceRecord())):
                record.add(accepted, rejections, _PRIOR_MEMORY)

    def forget(self, request: str) -> None:
        for reading in self._overall:
            self._requests.pop((request, reading), None)

    def retain(self, requests: Iterable[str], beyond: int) -> None:
        """Drop the records of all other requests if there are more than `beyond`: aborted requests are not reported."""
        if len(self._requests) > beyond:
            kept = set(requests)
            self._requests = {key: record for key, record in self._requests.items() if key[0] in kept}

    def _context_bucket(self, context: int) -> int:
        return (context // self._reads).bit_length() if self._reads else 0
