"""Decides when filling in a draft model's missing KV pays off. Free of torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from engine.scheduler.request import Request

_HORIZON = 256
"""Largest number of further tokens that a row is assumed to generate."""
_MEMORY = 0.9
"""Weight of earlier measurements after a further one."""


class CatchUp:
    """Cost of catching up per token, learnt from rounds that do it, and choice of the rows that are worth it.

    Until the first such round the cost is assumed to be zero, so that it is soon measured.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._tokens = 0.0

    def record(self, tokens: int, seconds: float) -> None:
        """Learn from a round in which `tokens` tokens took `seconds`, without its drafts."""
        self._seconds = _MEMORY * self._seconds + max(0.0, seconds)
        self._tokens = _MEMORY * self._tokens + tokens

    def seconds(self, tokens: float) -> float:
        """Predict the seconds of catching up on `tokens` tokens."""
        return self._seconds / self._tokens * tokens if self._tokens else 0.0

    def worthwhile(self, rows: Sequence[Request], limits: npt.NDArray[np.int64], saved: float) -> npt.NDArray[np.int64]:
        """Return the limits on drafts: `limits`, or 0 for rows on which catching up costs more than it saves.

        saved: seconds that drafts save per token, as these count (Options.worth); not positive: drafts do not pay.
        """
        found = limits.copy()
        for i, request in enumerate(rows):
            if request.needs_catch_up:
                left = min(_HORIZON, request.params.max_tokens - request.num_output)
                if self.seconds(request.draft_lag) > saved * left or saved <= 0:
                    found[i] = 0
        return found


def only_smallest_lag(rows: Sequence[Request], limits: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return limits that let only the row with the smallest lag draft: the cheapest exploration."""
    able = [i for i, limit in enumerate(limits.tolist()) if limit]
    found = np.zeros_like(limits)
    if able:
        i = min(able, key=lambda i: rows[i].draft_lag)
        found[i] = limits[i]
    return found
