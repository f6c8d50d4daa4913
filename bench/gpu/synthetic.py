"""Accept drafts at random, to measure speed with random weights, where no draft would be accepted.

Only this module can do it: the engine has no such option.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
from torch import Tensor

from engine.batch.round_batch import RoundBatch
from engine.sampling.sampler import Sampler
from engine.speculation.verify import Verdict, verify
from kernels.ragged import Ints


class RandomVerify:
    """Replacement of `verify` with the same work. Accepts each draft with probability `alpha`, up to a rejection.

    Each round spreads the rows evenly over that distribution, so that a few rounds already have its mean.
    """

    def __init__(self, alpha: float, seed: int = 0) -> None:
        self._alpha = alpha
        self._random = np.random.default_rng(seed)

    def __call__(self, drafted: Tensor, logits: Tensor, batch: RoundBatch, sampler: Sampler) -> Verdict:
        verdict = verify(drafted, logits, batch, sampler)
        verdict.rows[:, 1] = batch.state.to_device(self.accepted(batch.gamma))
        return verdict

    def accepted(self, gamma: Ints) -> Ints:
        """Draw each row's number of accepted drafts. gamma: [rows], drafts of each row."""
        rows = len(gamma)
        level = (self._random.permutation(rows) + self._random.random()) / max(1, rows)  # one in each of equal parts
        at_least = self._alpha ** np.arange(1, int(gamma.max(initial=0)) + 1)  # probability of 1, 2, … accepted ones
        drawn: Ints = np.minimum((level[:, None] < at_least).sum(1), gamma)
        return drawn


@contextmanager
def synthetic_acceptance(alpha: float) -> Iterator[None]:
    """Make engines of this process accept drafts at random inside the block."""
    with patch("engine.speculation.round.verify", RandomVerify(alpha)):
        yield
