"""Online estimates of how often drafts from the text are accepted: of each request, by how long they match."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence

from engine.control.acceptance import AcceptanceRecord

_CLASS_STARTS = (3, 5, 9, 16)
"""Matches from which the next class begins."""
_START_ALPHAS, _START_TRIALS = (0.6, 0.7, 0.8, 0.85, 0.9), 5.0
"""Priors of the classes before anything was judged, and their weight in judged tokens. Optimistic: a draft that is not
taken costs little more than its verification, and one that is not made is never judged."""
_REQUEST_TRIALS = 4.0
_REQUEST_MEMORY, _CLASS_MEMORY = 60.0, 300.0
"""As in engine.control.acceptance."""
_START_WEIGHT = 0.5
"""Weight of the optimistic prior in that of a request, beside what others had. Requests differ: what is copied in one
is made up in the next."""
_REQUEST_FADE, _CLASS_FADE = 0.98, 0.998
"""Shares of a request's record, and of a class's, that are left after a round. Text that begins to repeat itself is
found again, although it was not worth drafting before."""


class TextAcceptance:
    """Acceptance at two levels, the first being the prior of the second: matches of about the same length; those of one
    request."""

    def __init__(self) -> None:
        self._classes = [AcceptanceRecord() for _ in _START_ALPHAS]
        self._requests: dict[str, list[AcceptanceRecord | None]] = {}

    def fade(self, requests: Iterable[str]) -> None:
        """Let one round pass. requests: those that take part in it."""
        for record in self._classes:
            record.fade(_CLASS_FADE)
        for request in requests:
            for own in self._requests.get(request, ()):
                if own is not None:
                    own.fade(_REQUEST_FADE)

    def alphas(self, requests: Sequence[str], matches: Sequence[int]) -> list[float]:
        """Estimate for each request the probability that a draft is accepted, given that those before it were.

        matches: tokens before the proposal that its source has in common with the text; 0: there is none.
        """
        priors = [
            _START_WEIGHT * start + (1 - _START_WEIGHT) * record.alpha(start, _START_TRIALS)
            for record, start in zip(self._classes, _START_ALPHAS, strict=True)
        ]
        found = []
        for request, match in zip(requests, matches, strict=True):
            length = bisect_right(_CLASS_STARTS, match)
            own = self._requests.get(request)
            record = own[length] if own is not None else None
            if record is None:
                found.append(priors[length])
                continue
            found.append(record.alpha(priors[length], _REQUEST_TRIALS))
        return found

    def update(self, rows: Iterable[tuple[str, int, int, bool]]) -> None:
        """Learn from a round.

        rows: (request, match, drafts accepted, whether one was rejected after them) of each row with drafts from the
        text.
        """
        for request, match, accepted, rejected in rows:
            length = bisect_right(_CLASS_STARTS, match)
            own = self._requests.setdefault(request, [None] * len(_START_ALPHAS))
            if (record := own[length]) is None:
                record = own[length] = AcceptanceRecord()
            record.add(accepted, rejected, _REQUEST_MEMORY)
            self._classes[length].add(accepted, rejected, _CLASS_MEMORY)

    def forget(self, request: str) -> None:
        self._requests.pop(request, None)

    def retain(self, requests: Iterable[str], beyond: int) -> None:
        """See AcceptanceEstimates.retain."""
        if len(self._requests) > beyond:
            kept = set(requests)
            self._requests = {key: records for key, records in self._requests.items() if key in kept}
