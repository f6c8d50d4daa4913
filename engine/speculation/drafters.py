"""Drafters: propose tokens for the target to verify. A drafter may be slow, be wrong or propose nothing; it never
changes the distribution of the text."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from engine.batch.round_batch import RoundBatch
from engine.batch.runner import Runner
from engine.batch.stopwatch import Stopwatch
from engine.batch.view import View
from engine.kv.policy import KVPolicy
from engine.plan import RowStart
from engine.sampling.sampler import Sampler
from engine.speculation.draft_graphs import DraftGraphs
from engine.speculation.verify import Verdict
from kernels.ragged import Ints


class Drafter(Protocol):
    """Interface of drafters: propose tokens after the committed ones of each row, and after those that the plan
    contains; never change committed state."""

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
    """Drafter without a model: a round has the drafts that its plan contains, or decodes plainly."""

    def start(self, start: RowStart) -> None:
        """Do nothing: no state is kept."""

    def propose(self, batch: RoundBatch) -> Tensor:
        return batch.gamma_device

    def observe(self, batch: RoundBatch, verdict: Verdict) -> None:
        """Do nothing: there is nothing to learn from."""


class SelfDrafter:
    """Self-speculation: the target's own weights, reading sparse KV (MagicDec, arXiv 2408.11049, section 4).

    The draft writes into slots that each row has reserved after its committed tokens. They are slots of the target's
    pool where the draft reads a view into it, and the verify pass overwrites them; else of a pool of the policy's own,
    which it brings up to date from the target's. So the KV that a draft reads of committed tokens is always the
    target's.
    """

    def __init__(self, runner: Runner, sampler: Sampler, policy: KVPolicy, graphs: DraftGraphs | None = None) -> None:
        """runner: drafts with the target's model, over the policy's pool. graphs: replay all steps of a round."""
        self._runner = runner
        self._sampler = sampler
        self._policy = policy
        self._graphs = graphs

    def start(self, start: RowStart) -> None:
        self._policy.start(start)

    def propose(self, batch: RoundBatch) -> Tensor:
        count = batch.num_drafting
        if count:
            self._policy.prepare(batch, batch.computed[:count])
            draft(batch, self._runner, self._policy.view(batch.budget), self._sampler, self._graphs)
        self.watch(batch)
        return batch.gamma_device

    def watch(self, batch: RoundBatch) -> None:
        """Prepare for the round's verify pass, whoever drafts."""
        self._policy.watch(batch.row, batch.computed, batch.new + batch.gamma, batch.gamma)

    def observe(self, batch: RoundBatch, verdict: Verdict) -> None:
        """Do nothing: the KV that drafts read is the target's."""


def draft(
    batch: RoundBatch, runner: Runner, view: View, sampler: Sampler, graphs: DraftGraphs | None, lag: Ints | None = None
) -> None:
    """Draft each row's tokens after its proposed ones, one forward per token.

    view: KV that is read. graphs: replay all steps where they can. lag: see RoundBatch.draft_inputs.
    """
    if graphs is not None and graphs.draft(batch, view, lag):
        return
    for step in range(batch.max_steps):
        inputs, samples = batch.draft_inputs(step, view, lag), batch.draft_samples([step])
        batch.place_drafts(samples, sampler.draft(runner.forward(inputs), samples))
        lag = None


class EitherDrafter:
    """Two drafters, of which the plan names one for each round. In the other's rounds, each has rows that do not draft:
    a draft model's tokens are left for its next catching up."""

    def __init__(self, model: Drafter, own: SelfDrafter) -> None:
        self._model, self._own = model, own

    def start(self, start: RowStart) -> None:
        self._model.start(start)
        self._own.start(start)

    def propose(self, batch: RoundBatch) -> Tensor:
        if batch.drafter == "self":
            return self._own.propose(batch)
        drafted = self._model.propose(batch)
        self._own.watch(batch)
        return drafted

    def observe(self, batch: RoundBatch, verdict: Verdict) -> None:
        self._model.observe(batch, verdict)
        self._own.observe(batch, verdict)


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
