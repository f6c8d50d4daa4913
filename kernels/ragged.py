"""Host arithmetic of ragged rows laid end to end."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


def ragged_arange(counts: Ints) -> Ints:
    """Concatenate 0 … count - 1 of each count: the index of every item within its own row."""
    return np.arange(int(counts.sum())) - np.repeat(counts.cumsum() - counts, counts)


def offsets(counts: Ints) -> Ints:
    """Return the offset of each row, and the total."""
    return np.concatenate([np.zeros(1, dtype=np.int64), counts.cumsum()])
