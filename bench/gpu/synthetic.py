"""Rounds in which chance decides how many drafts hold: for studies of speed where weights are random and nothing would.

Nothing outside this file can bring it about: the engine's own round knows no such thing.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np

from engine.batch.rows import RoundBatch
from engine.batch.runner import Runner
from engine.sampling.sampler import Sampler
from engine.speculation.drafters import Drafter
from engine.speculation.verify import Verdict, verify


class Chance:
    """`engine.speculation.round.run_round`, but that each draft is accepted with a probability, up to the first that is
    not; the work is the same."""

    def __init__(self, alpha: float, seed: int = 0) -> None:
        self._alpha = alpha
        self._random = random.Random(seed)

    def __call__(self, rows: RoundBatch, target: Runner, drafter: Drafter, sampler: Sampler) -> Verdict:
        drafted = drafter.propose(rows)
        logits = target.forward(rows.verify_batch(target.view))
        verdict = self._judge(verify(drafted, logits, rows, sampler), rows)
        rows.commit(verdict.rows)
        sampler.observe(rows, verdict.chosen, verdict.accepted)
        drafter.observe(rows, verdict)
        return verdict

    def _judge(self, verdict: Verdict, rows: RoundBatch) -> Verdict:
        held = np.array([self._held(int(gamma)) for gamma in rows.gamma])
        verdict.rows[:, 1] = rows.state.to_device(held)
        return verdict

    def _held(self, gamma: int) -> int:
        held = 0
        while held < gamma and self._random.random() < self._alpha:
            held += 1
        return held


@contextmanager
def accepting(alpha: float) -> Iterator[None]:
    """Engines of this process run such rounds meanwhile."""
    with patch("engine.worker.worker.run_round", Chance(alpha)):
        yield
