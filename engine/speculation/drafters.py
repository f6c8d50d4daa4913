"""Whatever proposes tokens for the target to check. It can be slow, wrong or silent, but never change the text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from engine.batch.rows import Ints, Round
from engine.batch.runner import Runner
from engine.batch.stopwatch import Stopwatch
from engine.kv.policies import View
from engine.sampling.sampler import Sampler
from engine.speculation.draft_cache import DraftCache
from engine.speculation.verify import Verdict


class Drafter(Protocol):
    """Proposes tokens behind the committed ones of each row; never touches committed state."""

    def propose(self, rows: Round) -> Tensor:
        """Place up to gamma tokens behind each row (`Round.place_drafts`).

        Returns how many: [rows] int64, at most `rows.gamma_asked`. It may be fewer than asked, or none.
        """
        ...

    def observe(self, rows: Round, verdict: Verdict) -> None:
        """Learn what the target decided."""
        ...


class NoDrafter:
    """Proposes nothing: every round decodes plainly. For deployments whose gamma is always 0."""

    def propose(self, rows: Round) -> Tensor:
        return torch.zeros_like(rows.gamma_asked)

    def observe(self, rows: Round, verdict: Verdict) -> None:
        """Nothing was drafted."""


class SelfDrafter:
    """Self-speculation: the target's own weights, reading sparse KV (MagicDec, arXiv 2408.11049, section 4).

    The draft writes into slots that each row has reserved behind its committed tokens - of the target's pool, where it
    reads a view into that, and the verify pass overwrites them; else of a cache of its own, which is brought up to date
    from the target's pool. So what a draft reads of committed tokens is always the target's.
    """

    def __init__(
        self, runner: Runner, sampler: Sampler, cache: DraftCache | None = None, views: Mapping[int, View] | None = None
    ) -> None:
        """runner: the target's model, with the pool and the view that drafts use: those of `cache`, if there is one.
        views: other views, by the budget that a round may ask for.
        """
        self._runner = runner
        self._views = views or {}
        self._sampler = sampler
        self._cache = cache

    def propose(self, rows: Round) -> Tensor:
        if self._cache is not None:
            for start in rows.starts:
                self._cache.start(start)
            if rows.drafting:
                self._cache.catch_up(rows, rows.computed[: rows.drafting])
            self._cache.observe(rows.row, rows.computed, rows.new + rows.gamma)
        draft(rows, self._runner, self._sampler, view=self._views.get(rows.budget))
        return rows.gamma_asked

    def observe(self, rows: Round, verdict: Verdict) -> None:
        """Its KV is the target's: nothing to learn."""


def draft(
    rows: Round, runner: Runner, sampler: Sampler, *, view: View | None = None, behind: Ints | None = None
) -> None:
    """Draft up to gamma tokens behind each row, one forward per token. view: in place of the runner's. behind: see
    Round.draft_batch."""
    if runner.drafts is not None and runner.drafts.draft(rows, view or runner.view, behind):
        return
    for step in range(rows.gamma_max):
        batch, decisions = rows.draft_batch(step, view or runner.view, behind if step == 0 else None)
        tokens = sampler.draft(runner.forward(batch), decisions)
        rows.place_drafts(decisions, tokens)


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
