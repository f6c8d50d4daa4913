"""When it pays to let a draft model see what a row has so far, which it must before it drafts for it. Free of torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from engine.scheduler.request import Request

_HORIZON = 256
"""A row is taken to go on for so many tokens at most, whatever it may."""
_MEMORY = 0.9
"""The share of what was learnt that is left after the next round."""


class CatchUp:
    """What it costs per token, learnt from rounds in which it is done, and which rows are worth it.

    Until the first such round it is taken to cost nothing: what is done is soon known, what is not done never.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._tokens = 0.0

    def observe(self, tokens: int, seconds: float) -> None:
        """A round in which `tokens` tokens took `seconds`, beside its drafts."""
        self._seconds = _MEMORY * self._seconds + max(0.0, seconds)
        self._tokens = _MEMORY * self._tokens + tokens

    def seconds(self, tokens: float) -> float:
        """What so many take."""
        return self._seconds / self._tokens * tokens if self._tokens else 0.0

    def worthwhile(self, rows: Sequence[Request], limits: npt.NDArray[np.int64], saved: float) -> npt.NDArray[np.int64]:
        """Drafts that rows may make if only those draft that have little to catch up with: `limits`, or 0.

        saved: seconds that a drafted-for row saves per token it yields; not positive: drafts do not pay.
        """
        found = limits.copy()
        for i, request in enumerate(rows):
            if is_late(request):
                left = min(_HORIZON, request.params.max_tokens - request.num_output)
                if self.seconds(request.draft_lag) > saved * left or saved <= 0:
                    found[i] = 0
        return found


def is_late(request: Request) -> bool:
    """Whether a draft model would have to compute more than it feeds along with the pending token."""
    return request.draft_lag > 1


def nearest(rows: Sequence[Request], limits: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Limits that let only the row draft that has least to catch up with: what a try costs at least."""
    able = [i for i, limit in enumerate(limits.tolist()) if limit]
    found = np.zeros_like(limits)
    if able:
        i = min(able, key=lambda i: rows[i].draft_lag)
        found[i] = limits[i]
    return found
