"""All steps of drafting in two graphs: sampled tokens feed the next step on the device, without a host sync.

A step of a small model takes less time than the host needs to launch its kernels one by one, or to sample a token in
between. Everything that a step reads is known before the first one runs, except the tokens. The first step is a graph
of its own, so that the device is busy with it while the host prepares the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from engine.batch.forward_graphs import GraphInputs, log_capture, round_up
from engine.batch.round_batch import RoundBatch, SamplePositions
from engine.batch.row_state import Ints
from engine.batch.runner import Runner
from engine.kv.policies import View
from engine.sampling.sampler import Sampler
from kernels.ops import Graphs
from models.batch import ForwardBatch


@dataclass(frozen=True, slots=True)
class _Step:
    """One captured step. last: [rows] int64, index of each row's last query in `inputs`. position: [rows] int64,
    position that is sampled. chosen: [rows] int64, the sampled tokens."""

    inputs: GraphInputs
    last: Tensor
    position: Tensor
    chosen: Tensor

    def copy(self, inputs: ForwardBatch, samples: SamplePositions) -> None:
        """Copy in the inputs of the next replay."""
        self.inputs.copy(inputs)
        self.last[: len(inputs.logit_index)] = inputs.logit_index
        self.position[: len(samples.position)] = samples.position


@dataclass(frozen=True, slots=True)
class _Bucket:
    """Steps for a number of rows, shared by graphs of any number of steps.

    temperature: [rows] float64. seeds: [rows] int64. replays: by (first step, last step + 1).
    """

    steps: list[_Step]
    temperature: Tensor
    seeds: Tensor
    replays: dict[tuple[int, int], Callable[[], None]]


class DraftGraphs:
    """Captured draft steps of one runner, whose pool has a scratch page."""

    def __init__(
        self,
        runner: Runner,
        graphs: Graphs,
        sampler: Sampler,
        *,
        rows: Iterable[int],
        gammas: Iterable[int],
        first: int,
        width: int,
    ) -> None:
        """Capture, for each of `rows`, each of `gammas` steps. All ranks that share the model do so at the same time.

        first: largest number of queries of a row in the first step; later steps have one. width: largest number of
        pages in a row's list.
        """
        self._model, self._pool, self._graphs, self._sampler = runner.model, runner.pool, graphs, sampler
        self._rows, self._gammas = sorted(rows), sorted(gammas)
        self._first, self._width = first, width
        what = f"drafts of up to {self._gammas[-1]} tokens for up to {self._rows[-1]} rows"
        with log_capture(what, self._model.device):  # the largest first, so that the others fit into its memory
            self._buckets = {count: self._capture(count) for count in self._rows[::-1]}

    def draft(self, batch: RoundBatch, view: View, lag: Ints | None) -> bool:
        """Draft for all drafting rows of the round; see engine.speculation.drafters.draft. Returns False, and does
        nothing, where no graph fits."""
        count, gamma = round_up(self._rows, batch.num_drafting), batch.gamma_max
        if count is None or gamma not in self._gammas or not self._sampler.is_plain(batch.row[: batch.num_drafting]):
            return False
        bucket = self._buckets[count]
        inputs, samples = batch.draft_inputs(0, view, lag)
        if not bucket.steps[0].inputs.fits(inputs):
            return False
        temperature, seeds = self._sampler.temperatures_and_seeds(samples)
        bucket.temperature[: batch.num_drafting], bucket.seeds[: batch.num_drafting] = temperature, seeds
        bucket.steps[0].copy(inputs, samples)
        bucket.replays[0, 1]()
        drafted = [samples]
        for step in range(1, gamma):
            inputs, samples = batch.draft_inputs(step, view)
            bucket.steps[step].copy(inputs, samples)
            drafted.append(samples)
        if gamma > 1:
            bucket.replays[1, gamma]()
        for replayed, samples in zip(bucket.steps, drafted, strict=False):
            batch.place_drafts(samples, replayed.chosen[: len(samples.position)])
        return True

    def _capture(self, rows: int) -> _Bucket:
        steps = [self._step(rows, 1 if index else self._first) for index in range(self._gammas[-1])]
        device = self._model.device
        temperature = torch.zeros(rows, dtype=torch.float64, device=device)
        bucket = _Bucket(steps, temperature, torch.zeros(rows, dtype=torch.int64, device=device), {})
        for first, end in [*((1, gamma) for gamma in self._gammas[::-1] if gamma > 1), (0, 1)]:
            bucket.replays[first, end] = self._graphs.capture(partial(self._work, bucket, first, end))
        return bucket

    def _step(self, rows: int, queries: int) -> _Step:
        inputs = GraphInputs(self._model, self._pool, self._graphs, rows=rows, queries=queries, width=self._width)
        position, chosen = torch.zeros(2, rows, dtype=torch.int64, device=self._model.device)
        return _Step(inputs, torch.arange(rows, device=self._model.device), position, chosen)

    def _work(self, bucket: _Bucket, first: int, end: int) -> None:
        for index in range(first, end):
            step = bucket.steps[index]
            if index:
                step.inputs.ids.copy_(bucket.steps[index - 1].chosen)
            states = self._model.states(step.inputs.whole, self._pool, step.inputs.attention, step.last)
            logits = self._model.logits(states)
            step.chosen.copy_(self._sampler.sample(logits, bucket.temperature, bucket.seeds, step.position)[1])
