"""Drafters: propose tokens for the target to verify. A drafter may be slow, be wrong or propose nothing; it never
changes the distribution of the text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from engine.batch.round_batch import RoundBatch
from engine.batch.runner import Runner
from engine.batch.stopwatch import Stopwatch
from engine.kv.policies import View
from engine.plan import RowStart
from engine.sampling.sampler import Sampler
from engine.speculation.draft_cache import DraftCache
from engine.speculation.draft_graphs import DraftGraphs
from engine.speculation.verify import Verdict
from kernels.ragged import Ints


class Drafter(Protocol):
    """Interface of drafters: propose tokens after the committed ones of each row; never change committed state."""

    def start(self, start: RowStart) -> None:
        """Start a request in a row slot; called before the first round that the row is in."""
        ...

    def propose(self, batch: RoundBatch) -> Tensor:
        """Place up to gamma tokens after each row (`RoundBatch.place_drafts`).

        Returns their number, [rows] int64: at most `batch.gamma_device`; it may be fewer, or none.
        """
        ...

    def observe(self, batch: RoundBatch, verdict: Verdict) -> None:
        """Learn from the target's verdict."""
        ...


class NoDrafter:
    """Drafter that proposes nothing: every round decodes plainly. For deployments whose gamma is always 0."""

    def start(self, start: RowStart) -> None:
        """Do nothing: no state is kept."""

    def propose(self, batch: RoundBatch) -> Tensor:
        return torch.zeros_like(batch.gamma_device)

    def observe(self, batch: RoundBatch, verdict: Verdict) -> None:
        """Do nothing: no token was drafted."""


class SelfDrafter:
    """Self-speculation: the target's own weights, reading sparse KV (MagicDec, arXiv 2408.11049, section 4).

    The draft writes into slots that each row has reserved after its committed tokens. They are slots of the target's
    pool where the draft reads a view into it, and the verify pass overwrites them; else of a cache of the draft's own,
    which is brought up to date from the target's pool. So the KV that a draft reads of committed tokens is always the
    target's.
    """

    def __init__(
        self,
        runner: Runner,
        sampler: Sampler,
        cache: DraftCache | None = None,
        views: Mapping[int, View] | None = None,
        graphs: DraftGraphs | None = None,
    ) -> None:
        """runner: the target's model with the pool and the view that drafts use: those of `cache`, if there is one.
        views: other views, by the budget that a round may ask for. graphs: replay all steps of a round.
        """
        self._runner = runner
        self._views = views or {}
        self._sampler = sampler
        self._cache = cache
        self._graphs = graphs

    def start(self, start: RowStart) -> None:
        if self._cache is not None:
            self._cache.start(start)

    def propose(self, batch: RoundBatch) -> Tensor:
        if self._cache is not None:
            if batch.num_drafting:
                self._cache.catch_up(batch, batch.computed[: batch.num_drafting])
            self._cache.capture_queries(batch.row, batch.computed, batch.new + batch.gamma)
        draft(batch, self._runner, self._sampler, self._graphs, view=self._views.get(batch.budget))
        return batch.gamma_device

    def observe(self, batch: RoundBatch, verdict: Verdict) -> None:
        """Do nothing: the KV that drafts read is the target's."""


def draft(
    batch: RoundBatch,
    runner: Runner,
    sampler: Sampler,
    graphs: DraftGraphs | None,
    *,
    view: View | None = None,
    lag: Ints | None = None,
) -> None:
    """Draft up to gamma tokens after each row, one forward per token.

    graphs: replay all steps where they can. view: in place of the runner's. lag: see RoundBatch.draft_inputs.
    """
    if graphs is not None and graphs.draft(batch, view or runner.view, lag):
        return
    for step in range(batch.gamma_max):
        inputs, samples = batch.draft_inputs(step, view or runner.view, lag), batch.draft_samples([step])
        batch.place_drafts(samples, sampler.draft(runner.forward(inputs), samples))
        lag = None


class TimedDrafter:
    """Any drafter, with a stopwatch that times its proposals."""

    def __init__(self, drafter: Drafter, watch: Stopwatch) -> None:
        self._drafter = drafter
        self._watch = watch

    def start(self, start: RowStart) -> None:
        self._drafter.start(start)

    def propose(self, batch: RoundBatch) -> Tensor:
        with self._watch:
            return self._drafter.propose(batch)

    def observe(self, batch: RoundBatch, verdict: Verdict) -> None:
        self._drafter.observe(batch, verdict)
