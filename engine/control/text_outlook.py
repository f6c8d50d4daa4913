"""Worth of a model's drafts where text may be copied soon.

A round that takes what has the most tokens per second of its own would draft new text far, and with it the beginning of
what could be copied at a fraction of the time. So a token that a model drafts counts for what it would cost otherwise.
It counts fully where nothing can be copied, and where it would be part of a copy, only for what a copied token costs:
the share of a plain round that one more draft in a verify pass takes, for each draft from the text that is needed to
have one accepted.

    worth of draft s = 1 - copied_s (1 - min(1, share / efficiency))
    copied_s = begin / (begin + end) * (1 - (1 - begin - end)^s)

begin is the probability that a copy begins after a token, and end that it ends after one of its own (a chain of two
states). efficiency is the share of the drafts from the text that are accepted. A single token that is found is no copy:
it takes a round all the same. Throughput is higher in the long run where every round has the most worth per second.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

from engine.control.acceptance import AcceptanceRecord, RequestRecords
from kernels.ragged import Ints

COPY = 2
"""Smallest number of accepted drafts from the text that are a copy."""
_START_WAIT, _START_STAY, _START_EFFICIENCY, _START_TOKENS = 0.9, 0.9, 0.7, 10.0
"""Priors before anything was seen: that no copy begins after a token, that one goes on, and that a draft from the text
is accepted; and their weight in tokens."""
_REQUEST_TOKENS = 4.0
"""Number of tokens after which a request's own record weighs as much as its prior."""
_REQUEST_MEMORY, _MEMORY = 60.0, 300.0
"""Number of tokens that a request's record, and that of all, retain."""


class Advance(NamedTuple):
    """A row's part in a round. proposed, copied: number of its drafts from the text, and of the accepted ones. tokens:
    number that it yielded."""

    request: str
    proposed: int
    copied: int
    tokens: int


class _Records(NamedTuple):
    """What is known of copies. waits: tokens after which none began, as accepted ones, and those after which one did.
    stays: copied tokens, and ends. drafts: from the text, accepted or not."""

    waits: AcceptanceRecord
    stays: AcceptanceRecord
    drafts: AcceptanceRecord

    @classmethod
    def empty(cls) -> Self:
        return cls(AcceptanceRecord(), AcceptanceRecord(), AcceptanceRecord())

    def estimates(self, priors: Sequence[float], weight: float) -> list[float]:
        return [record.alpha(prior, weight) for record, prior in zip(self, priors, strict=True)]


@dataclass(slots=True)
class _Row:
    """Row of a request. copies: whether it did in its last round. goes_on: whether that copy had not ended. tokens:
    number that the round yielded."""

    copies: bool
    goes_on: bool
    tokens: int
    records: _Records = field(default_factory=_Records.empty)


class TextOutlook(RequestRecords[_Row]):
    """Estimates of all requests, and of each one."""

    def __init__(self) -> None:
        super().__init__()
        self._all = _Records.empty()

    def worth(self, requests: Sequence[str], steps: Ints, share: float) -> npt.NDArray[np.float64]:
        """Return the worth of a model's drafts, if they are accepted: [requests, steps]. steps: their numbers, from 1.
        share: from 0 to 1, see the head of this module."""
        priors = self._all.estimates((_START_WAIT, _START_STAY, _START_EFFICIENCY), _START_TOKENS)
        rows = [self._requests.get(request) for request in requests]
        found = [priors if row is None else row.records.estimates(priors, _REQUEST_TOKENS) for row in rows]
        waits, stays, efficiency = np.array(found).T[..., None]
        begin, end = 1 - waits, 1 - stays
        copied = begin / (begin + end) * (1 - (1 - begin - end) ** steps)
        worth: npt.NDArray[np.float64] = 1 - copied * (1 - np.minimum(1.0, share / efficiency))
        return worth

    def update(self, advances: Iterable[Advance]) -> None:
        """Learn from a round."""
        for request, proposed, copied, tokens in advances:
            row, copies = self._requests.get(request), copied >= COPY
            if row is None:
                row = self._requests[request] = _Row(copies, False, tokens)
            elif not row.copies:
                # After which of several tokens it could have begun is unknown: halfway, on average.
                waited = (row.tokens - 1) // 2 if copies else row.tokens
                _learn(row.records.waits, self._all.waits, waited, int(copies))
            if proposed:
                _learn(row.records.drafts, self._all.drafts, copied, proposed - copied)
            if copies or row.goes_on:  # a copy may end where a round does, before tokens that are found nowhere
                _learn(row.records.stays, self._all.stays, copied, int(copied < proposed or copied < COPY))
            row.copies, row.goes_on, row.tokens = copies, copies and copied == proposed, tokens


def _learn(own: AcceptanceRecord, of_all: AcceptanceRecord, accepted: int, rejected: int) -> None:
    own.add(accepted, rejected, _REQUEST_MEMORY)
    of_all.add(accepted, rejected, _MEMORY)
