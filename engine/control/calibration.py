"""Calibration of predicted times by measured ones, learnt as the engine runs. Free of torch."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable

_COMMON_RATE, _KIND_RATE, _BUCKET_RATE = 0.2, 0.05, 0.1
"""Share of an error that each level absorbs."""
_OUTLIER = 0.7
"""Largest error that counts, as a logarithm: a factor of two."""


class Calibration:
    """Factors on predicted times, by kind (plain step, draft step, …) and bucket (batches of similar size).

    The factor common to all kinds, as on a busy or throttled machine, is learnt fastest, from any of them; the factors
    of one kind, and of one kind in one bucket, more slowly. A kind that does not run for a while thus stays comparable
    with those that do.
    """

    def __init__(self) -> None:
        self._common = 0.0
        self._own: defaultdict[Hashable, float] = defaultdict(float)

    def factor(self, kind: Hashable, bucket: Hashable) -> float:
        return math.exp(self._log(kind, bucket))

    def update(self, kind: Hashable, bucket: Hashable, measured: float, predicted: float) -> None:
        """Learn from one measurement, in seconds. predicted: without calibration."""
        error = math.log(max(measured, 1e-9) / max(predicted, 1e-9)) - self._log(kind, bucket)
        error = max(-_OUTLIER, min(_OUTLIER, error))
        self._common += _COMMON_RATE * error
        self._own[kind] += _KIND_RATE * error
        self._own[kind, bucket] += _BUCKET_RATE * error

    def _log(self, kind: Hashable, bucket: Hashable) -> float:
        return self._common + self._own.get(kind, 0.0) + self._own.get((kind, bucket), 0.0)
