"""Worth of a model's drafts where text may be copied soon.

A round that takes what has the most tokens per second of its own would draft new text far, and with it the beginning of
what could be copied at a fraction of the time. So a token that a model drafts counts for what it would cost otherwise.
It counts fully while nothing is copied from the text, and where a copy has begun by then, only for the share of that
cost which a copied token has:

    worth of draft s = share + (1 - share) * kept^s

kept is the probability that no copy begins after a token either, share the speed of rounds that do not copy by that of
those which do. Throughput is higher in the long run where every round has the most worth per second.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from engine.control.acceptance import AcceptanceRecord

_START_KEPT, _START_TOKENS = 0.9, 10.0
"""Prior of `kept` before anything was seen, and its weight in tokens."""
_REQUEST_TOKENS = 4.0
"""Number of tokens after which a request's own record weighs as much as its prior."""
_REQUEST_MEMORY, _MEMORY = 60.0, 300.0
"""Number of tokens that a request's record, and that of all, retain."""
_SPEED_KEPT = 0.95
"""Share of the record of speeds that is left after a round."""
_START_ROUNDS = 1.0
"""Weight of the prior of both speeds, that of plain decoding, in plain rounds of one row."""


class Advance(NamedTuple):
    """A row's part in a round. copied: whether drafts came from its text. tokens: that it yielded."""

    request: str
    copied: bool
    tokens: int


@dataclass(slots=True)
class _Speed:
    """Worth of rows' tokens, and the time of their rounds in plain rounds."""

    worth: float = 0.0
    rounds: float = 0.0

    @property
    def value(self) -> float:
        return (self.worth + _START_ROUNDS) / (self.rounds + _START_ROUNDS)

    def add(self, worth: float, rounds: float) -> None:
        self.worth += worth
        self.rounds += rounds

    def fade(self) -> None:
        self.worth *= _SPEED_KEPT
        self.rounds *= _SPEED_KEPT


@dataclass(slots=True)
class _Row:
    """Row of a request. copied, tokens: of its last round, see Advance. waits: tokens after which no copy began, as
    accepted ones, and those after which one did."""

    copied: bool
    tokens: int
    waits: AcceptanceRecord = field(default_factory=AcceptanceRecord)


class TextOutlook:
    """Estimates of all requests, and of each one."""

    def __init__(self) -> None:
        self._all = AcceptanceRecord()
        self._rows: dict[str, _Row] = {}
        self._copying, self._others = _Speed(), _Speed()

    @property
    def share(self) -> float:
        """Cost of a copied token by that of another one, up to 1."""
        return min(1.0, self._others.value / self._copying.value)

    def worth(self, requests: Sequence[str], steps: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Return the worth of a model's drafts, if they are accepted: [requests, steps]. steps: their numbers, from
        1."""
        kept, share = self._kept(requests), self.share
        waiting: npt.NDArray[np.float64] = np.array(kept)[:, None] ** steps
        return share + (1 - share) * waiting

    def update(self, advances: Sequence[Advance], rounds: float | None) -> None:
        """Learn from a round. rounds: its time in plain rounds of the same rows; None: unknown."""
        if rounds is not None:
            self._learn_speeds(advances, rounds)
        for request, copied, tokens in advances:
            row = self._rows.get(request)
            if row is None:
                row = self._rows[request] = _Row(copied, tokens)
            elif not row.copied:
                # After which of several tokens it could have begun is unknown: halfway, on average.
                waited = (row.tokens - 1) // 2 if copied else row.tokens
                row.waits.add(waited, int(copied), _REQUEST_MEMORY)
                self._all.add(waited, int(copied), _MEMORY)
            row.copied, row.tokens = copied, tokens

    def _learn_speeds(self, advances: Sequence[Advance], rounds: float) -> None:
        share = self.share
        for speed in (self._copying, self._others):
            speed.fade()
        for (_, copied, tokens), kept in zip(advances, self._kept([each.request for each in advances]), strict=True):
            if copied:
                self._copying.add(tokens, rounds)
            else:
                waiting = kept * (1 - kept ** (tokens - 1)) / (1 - kept) if kept < 1 else tokens - 1
                self._others.add(1 + share * (tokens - 1) + (1 - share) * waiting, rounds)

    def _kept(self, requests: Sequence[str]) -> list[float]:
        """Estimate `kept` of each request."""
        prior = self._all.alpha(_START_KEPT, _START_TOKENS)
        rows = [self._rows.get(request) for request in requests]
        return [prior if row is None else row.waits.alpha(prior, _REQUEST_TOKENS) for row in rows]

    def forget(self, request: str) -> None:
        self._rows.pop(request, None)

    def retain(self, requests: Iterable[str], beyond: int) -> None:
        """See AcceptanceEstimates.retain."""
        if len(self._rows) > beyond:
            those = set(requests)
            self._rows = {key: row for key, row in self._rows.items() if key in those}
