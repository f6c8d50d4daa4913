"""Ways to draft in one round, each with the options that it gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engine.control.catch_up import CatchUp, only_smallest_lag
from engine.control.goodput import Batch, Goodput, Options
from engine.plan import DrafterName
from engine.scheduler.controller import Way


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way. batch: the rows, with limits on what they draft in this way. lags: whether none does because the model
    would have to catch up on all of them. would_draft: whether it would draft without that."""

    way: Way
    batch: Batch
    options: Options
    lags: bool = False
    would_draft: bool = True

    @property
    def rate(self) -> float:
        """Return the most predicted worth per second."""
        return float(self.options.rates.max())


class Candidates:
    """Candidates of a round by way, made when they are first asked for."""

    def __init__(
        self, batch: Batch, goodput: Mapping[DrafterName | None, Goodput], ways: Sequence[Way], catch_up: CatchUp
    ) -> None:
        """goodput: by a way's drafter. ways: all that there are."""
        self._batch, self._goodput, self._ways, self._catch_up = batch, goodput, ways, catch_up
        self._made: dict[Way, Candidate] = {}

    def __getitem__(self, way: Way) -> Candidate:
        if way not in self._made:
            self._made[way] = self._make(way)
        return self._made[way]

    def with_other_readings(self, candidate: Candidate) -> Options:
        """Return options in which each row reads what is not best for it."""
        return self._goodput[candidate.way.drafter].options(candidate.batch, candidate.way.budget, worse=True)

    def with_one_row(self, way: Way) -> Options:
        """Return options in which only the row that lags least drafts."""
        limits = only_smallest_lag(self._batch.rows, self._batch.limits)
        return self._goodput[way.drafter].options(self._batch.limited(limits), way.budget)

    def _keeps_up(self, way: Way) -> bool:
        """Whether the way's model never has to catch up."""
        return not self._goodput[way.drafter].model.has_own_kv

    def _make(self, way: Way) -> Candidate:
        """Make a candidate in which a row does not draft if a model would have to catch up on it, at a cost that its
        drafts do not save."""
        batch, goodput = self._batch, self._goodput[way.drafter]
        options = goodput.options(batch, way.budget)
        if self._keeps_up(way) or not any(request.needs_catch_up for request in batch.rows):
            return Candidate(way, batch, options)
        drafts, saved = bool(options.drafts[options.best].any()), 0.0
        if drafts:  # not all is found in the text
            without = [float(options.rates[0]), *(self[other].rate for other in self._ways if self._keeps_up(other))]
            saved = 1 / max(without) - 1 / float(options.rates.max())
        limited = batch.limited(self._catch_up.worthwhile(batch.rows, batch.limits, saved))
        if (limited.limits == batch.limits).all():
            return Candidate(way, batch, options)
        lags = not limited.limits.any()
        return Candidate(way, limited, goodput.options(limited, way.budget), bool(lags), drafts)
