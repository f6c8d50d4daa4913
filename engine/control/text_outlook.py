"""Worth of a model's drafts where text may be copied soon.

A round that takes what has the most tokens per second of its own would draft new text far, and with it the beginning of
what could be copied at a fraction of the time. So a token that a model drafts counts for what it would cost otherwise.
It counts fully while nothing could be copied, and where a copy has begun by then, only for the share of a plain round
that one more draft in a verify pass takes, as the copy would have had it as one more:

    worth of draft s = share + (1 - share) * kept^s

kept is the probability that no copy begins after a token either. A single token that is found is none: it takes a round
all the same. Throughput is higher in the long run where every round has the most worth per second.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from engine.control.acceptance import AcceptanceRecord, RequestRecords
from kernels.ragged import Ints

COPY = 2
"""Smallest number of accepted drafts from the text that are a copy."""
_START_KEPT, _START_TOKENS = 0.9, 10.0
"""Prior of `kept` before anything was seen, and its weight in tokens."""
_REQUEST_TOKENS = 4.0
"""Number of tokens after which a request's own record weighs as much as its prior."""
_REQUEST_MEMORY, _MEMORY = 60.0, 300.0
"""Number of tokens that a request's record, and that of all, retain."""


class Advance(NamedTuple):
    """A row's part in a round. copied: number of its accepted drafts from the text. tokens: number that it yielded."""

    request: str
    copied: int
    tokens: int


@dataclass(slots=True)
class _Row:
    """Row of a request. copies: whether it did in its last round. tokens: number that this yielded. waits: tokens after
    which no copy began, as accepted ones, and those after which one did."""

    copies: bool
    tokens: int
    waits: AcceptanceRecord = field(default_factory=AcceptanceRecord)


class TextOutlook(RequestRecords[_Row]):
    """Estimates of all requests, and of each one."""

    def __init__(self) -> None:
        super().__init__()
        self._all = AcceptanceRecord()

    def worth(self, requests: Sequence[str], steps: Ints, share: float) -> npt.NDArray[np.float64]:
        """Return the worth of a model's drafts, if they are accepted: [requests, steps]. steps: their numbers, from 1.
        share: from 0 to 1, see the head of this module."""
        prior = self._all.alpha(_START_KEPT, _START_TOKENS)
        rows = [self._requests.get(request) for request in requests]
        kept = [prior if row is None else row.waits.alpha(prior, _REQUEST_TOKENS) for row in rows]
        waiting: npt.NDArray[np.float64] = np.array(kept)[:, None] ** steps
        return share + (1 - share) * waiting

    def update(self, advances: Iterable[Advance]) -> None:
        """Learn from a round."""
        for request, copied, tokens in advances:
            row, copies = self._requests.get(request), copied >= COPY
            if row is None:
                row = self._requests[request] = _Row(copies, tokens)
            elif not row.copies:
                # After which of several tokens it could have begun is unknown: halfway, on average.
                waited = (row.tokens - 1) // 2 if copies else row.tokens
                row.waits.add(waited, int(copies), _REQUEST_MEMORY)
                self._all.add(waited, int(copies), _MEMORY)
            row.copies, row.tokens = copies, tokens
