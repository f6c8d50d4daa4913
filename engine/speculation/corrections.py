"""How far what is measured is from what was predicted, learnt as the engine runs. Free of torch."""

from __future__ import annotations

import math
from collections.abc import Hashable

_COMMON_RATE, _OWN_RATE = 0.2, 0.05
_TRUST = 4.0
"""Measurements of one bucket that weigh as much as all others of its kind."""
_MEMORY = 30.0
"""Measurements that a bucket remembers."""
_OUTLIER = 0.7
"""In logarithms: nothing is taken to be further off than by a factor of two."""


class Corrections:
    """Factors on predicted times, by kind (a plain step, a draft step, …) and bucket (batches like this one).

    Two levels. What all kinds have in common - a machine that is busy, or throttled - is learnt fast, from any of them;
    what one kind has of its own, slowly. So a kind that is not run for a while stays comparable with those that are.
    """

    def __init__(self) -> None:
        self._common = 0.0
        self._kinds: dict[Hashable, float] = {}
        self._buckets: dict[tuple[Hashable, Hashable], tuple[float, float]] = {}  # mean, weight

    def factor(self, kind: Hashable, bucket: Hashable) -> float:
        return math.exp(self._common + self._own(kind, bucket))

    def observe(self, kind: Hashable, bucket: Hashable, measured: float, predicted: float) -> None:
        """Seconds; predicted: without corrections."""
        surprise = math.log(max(measured, 1e-9) / max(predicted, 1e-9)) - self._common - self._own(kind, bucket)
        surprise = max(-_OUTLIER, min(_OUTLIER, surprise))
        self._common += _COMMON_RATE * surprise
        self._kinds[kind] = self._kinds.get(kind, 0.0) + _OWN_RATE * surprise
        mean, weight = self._buckets.get((kind, bucket), (0.0, 0.0))
        weight = min(weight + 1, _MEMORY)
        self._buckets[kind, bucket] = mean + (1 - _COMMON_RATE) * surprise / weight, weight

    def _own(self, kind: Hashable, bucket: Hashable) -> float:
        mean, weight = self._buckets.get((kind, bucket), (0.0, 0.0))
        return self._kinds.get(kind, 0.0) + mean * weight / (weight + _TRUST)
