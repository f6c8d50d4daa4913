"""Choice of the fastest of several variants by measured times."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

_Variant = TypeVar("_Variant")

LEAD = 1.1
"""A variant replaces one listed before it if it is faster by this factor: a choice must not depend on noise."""


def fastest(times: Sequence[Mapping[_Variant, float]]) -> _Variant:
    """Return the variant with the least geometric mean of seconds over all shapes; of nearly equal ones the first.

    times: seconds by variant, for each shape.
    """
    best, *others = times[0]
    for other in others:
        if sum(math.log(taken[best] / taken[other]) for taken in times) / len(times) > math.log(LEAD):
            best = other
    return best
