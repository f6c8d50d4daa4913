"""Accept drafts at random, to measure speed with random weights, where no draft would be accepted.

Only this module can do it: the engine has no such option.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
from torch import Tensor

from engine.batch.round_batch import RoundBatch
from engine.sampling.sampler import Sampler
from engine.speculation.verify import Verdict, verify


class RandomVerify:
    """Replacement of `verify` with the same work. Accepts each draft with probability `alpha`, up to a rejection."""

    def __init__(self, alpha: float, seed: int = 0) -> None:
        self._alpha = alpha
        self._random = random.Random(seed)

    def __call__(self, drafted: Tensor, logits: Tensor, batch: RoundBatch, sampler: Sampler) -> Verdict:
        verdict = verify(drafted, logits, batch, sampler)
        accepted = np.array([self._accepted(int(gamma)) for gamma in batch.gamma])
        verdict.rows[:, 1] = batch.state.to_device(accepted)
        return verdict

    def _accepted(self, gamma: int) -> int:
        accepted = 0
        while accepted < gamma and self._random.random() < self._alpha:
            accepted += 1
        return accepted


@contextmanager
def synthetic_acceptance(alpha: float) -> Iterator[None]:
    """Make engines of this process accept drafts at random inside the block."""
    with patch("engine.speculation.round.verify", RandomVerify(alpha)):
        yield
