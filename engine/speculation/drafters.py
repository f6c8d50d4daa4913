"""Whatever proposes tokens for the target to check. It can be slow, wrong or silent, but never change the text."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from engine.rows import Round
from engine.runner import Runner
from engine.sampling import Sampler
from engine.speculation.verify import Verdict
from engine.stopwatch import Stopwatch


class Drafter(Protocol):
    """Proposes tokens behind the committed ones of each row; never touches committed state."""

    def propose(self, rows: Round) -> Tensor:
        """Place up to gamma tokens behind each row (`Round.place_drafts`).

        Returns how many: [sampling rows] int64, at most `rows.gamma`. It may be fewer than asked, or none.
        """
        ...

    def observe(self, rows: Round, verdict: Verdict) -> None:
        """Learn what the target decided."""
        ...


class NoDrafter:
    """Proposes nothing: every round decodes plainly. For deployments whose gamma is always 0."""

    def propose(self, rows: Round) -> Tensor:
        return torch.zeros_like(rows.gamma)

    def observe(self, rows: Round, verdict: Verdict) -> None:
        """Nothing was drafted."""


class SelfDrafter:
    """Self-speculation: the target's own weights, reading sparse KV (MagicDec, arXiv 2408.11049, section 4).

    The draft reads a view into the target's pool and writes into slots that each row has reserved behind its committed
    tokens. The verify pass overwrites those, so committed KV is always the target's, and a draft has no cache to keep.
    """

    def __init__(self, runner: Runner, sampler: Sampler) -> None:
        """runner: the target's model and pool, with the draft's policy."""
        self._runner = runner
        self._sampler = sampler

    def propose(self, rows: Round) -> Tensor:
        for step in range(rows.gamma_max):
            batch, decisions = rows.draft_batch(step, self._runner.policy)
            tokens = self._sampler.choose(self._runner.forward(batch), decisions)
            rows.place_drafts(decisions, tokens)
        return rows.gamma

    def observe(self, rows: Round, verdict: Verdict) -> None:
        """Its KV is the target's: nothing to catch up."""


class TimedDrafter:
    """Any drafter, with a watch on its proposals."""

    def __init__(self, drafter: Drafter, watch: Stopwatch) -> None:
        self._drafter = drafter
        self._watch = watch

    def propose(self, rows: Round) -> Tensor:
        with self._watch:
            return self._drafter.propose(rows)

    def observe(self, rows: Round, verdict: Verdict) -> None:
        self._drafter.observe(rows, verdict)
