"""Online estimates of how often drafts from the text are accepted: of each request, by how long they match.

Where text is copied in parts, and values between names are made up, a proposal fails at its first token or holds for
long. So the first token has an estimate of its own, beside one for later ones. Every proposal is judged by the tokens
that follow, whether it was drafted or not.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from engine.control.acceptance import AcceptanceRecord, RequestRecords

CLASS_STARTS = (3, 5, 9, 16)
"""Matches from which the next class begins."""
_START_TRIALS = 5.0
"""Weight of the priors below, in judged tokens."""
_REQUEST_TRIALS = 4.0
_REQUEST_MEMORY, _CLASS_MEMORY = 60.0, 300.0
"""As in engine.control.acceptance."""
_REQUEST_FADE, _CLASS_FADE = 0.98, 0.998
"""Shares of a request's record, and of a class's, that are left after a round. Text that begins to repeat itself is
found again, although it was not worth drafting before."""


class TextAlpha(NamedTuple):
    """Probabilities that a proposal's first token is accepted, and each later one, given that those before it were."""

    first: float
    later: float


_START_ALPHAS = (
    TextAlpha(0.6, 0.75),
    TextAlpha(0.7, 0.8),
    TextAlpha(0.75, 0.85),
    TextAlpha(0.8, 0.9),
    TextAlpha(0.85, 0.95),
)
"""Priors of the classes before anything was judged."""


class JudgedProposal(NamedTuple):
    """Proposal whose tokens were followed by others. match: see Proposal. accepted: number of its first tokens that did
    follow. rejected: whether another one followed after them."""

    request: str
    match: int
    accepted: int
    rejected: bool


@dataclass(slots=True)
class _Record:
    first: AcceptanceRecord = field(default_factory=AcceptanceRecord)
    later: AcceptanceRecord = field(default_factory=AcceptanceRecord)

    def add(self, accepted: int, rejected: bool, memory: float) -> None:
        self.first.add(min(accepted, 1), int(rejected and not accepted), memory)
        self.later.add(max(accepted - 1, 0), int(rejected and accepted > 0), memory)

    def fade(self, kept: float) -> None:
        self.first.fade(kept)
        self.later.fade(kept)

    def alpha(self, prior: TextAlpha, trials: float) -> TextAlpha:
        return TextAlpha(self.first.alpha(prior.first, trials), self.later.alpha(prior.later, trials))


class TextAcceptance(RequestRecords[list[_Record | None]]):
    """Acceptance at two levels, the first being the prior of the second: matches of about the same length; those of one
    request."""

    def __init__(self) -> None:
        super().__init__()
        self._classes = [_Record() for _ in _START_ALPHAS]

    def fade(self, requests: Iterable[str]) -> None:
        """Let one round pass. requests: those that take part in it."""
        for record in self._classes:
            record.fade(_CLASS_FADE)
        for request in requests:
            for own in self._requests.get(request, ()):
                if own is not None:
                    own.fade(_REQUEST_FADE)

    def alphas(self, requests: Sequence[str], matches: Sequence[int]) -> list[TextAlpha]:
        """Estimate the acceptance of each request's proposal.

        matches: tokens before the proposal that its source has in common with the text; 0: there is none.
        """
        priors = [
            record.alpha(start, _START_TRIALS) for record, start in zip(self._classes, _START_ALPHAS, strict=True)
        ]
        found = []
        for request, match in zip(requests, matches, strict=True):
            length = bisect_right(CLASS_STARTS, match)
            own = self._requests.get(request)
            record = own[length] if own is not None else None
            found.append(priors[length] if record is None else record.alpha(priors[length], _REQUEST_TRIALS))
        return found

    def update(self, judged: Iterable[JudgedProposal]) -> None:
        """Learn from the proposals of a round."""
        for request, match, accepted, rejected in judged:
            length = bisect_right(CLASS_STARTS, match)
            own = self._requests.setdefault(request, [None] * len(_START_ALPHAS))
            if (record := own[length]) is None:
                record = own[length] = _Record()
            record.add(accepted, rejected, _REQUEST_MEMORY)
            self._classes[length].add(accepted, rejected, _CLASS_MEMORY)
