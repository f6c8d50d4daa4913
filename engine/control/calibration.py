"""How far what is measured is from what was predicted, learnt as the engine runs. Free of torch."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable

_COMMON_RATE, _KIND_RATE, _BUCKET_RATE = 0.2, 0.05, 0.1
"""Shares of a surprise that each level takes over."""
_OUTLIER = 0.7
"""In logarithms: nothing is taken to be further off than by a factor of two."""


class Corrections:
    """Factors on predicted times, by kind (a plain step, a draft step, …) and bucket (batches like this one).

    What all kinds have in common - a machine that is busy, or throttled - is learnt fastest, from any of them; what one
    kind, or one kind in one bucket, has of its own, more slowly. So a kind that is not run for a while stays comparable
    with those that are.
    """

    def __init__(self) -> None:
        self._common = 0.0
        self._own: defaultdict[Hashable, float] = defaultdict(float)

    def factor(self, kind: Hashable, bucket: Hashable) -> float:
        return math.exp(self._log(kind, bucket))

    def observe(self, kind: Hashable, bucket: Hashable, measured: float, predicted: float) -> None:
        """Seconds; predicted: without corrections."""
        surprise = math.log(max(measured, 1e-9) / max(predicted, 1e-9)) - self._log(kind, bucket)
        surprise = max(-_OUTLIER, min(_OUTLIER, surprise))
        self._common += _COMMON_RATE * surprise
        self._own[kind] += _KIND_RATE * surprise
        self._own[kind, bucket] += _BUCKET_RATE * surprise

    def _log(self, kind: Hashable, bucket: Hashable) -> float:
        return self._common + self._own.get(kind, 0.0) + self._own.get((kind, bucket), 0.0)
