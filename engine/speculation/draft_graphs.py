"""All steps of drafting in two graphs: sampled tokens feed the next step on the device, without a host sync.

A step of a small model takes less time than the host needs to launch its kernels one by one, or to sample a token in
between. Everything that a step reads is known before the first one runs, except the tokens. The first step is a graph
of its own, so that the device is busy with it while the host prepares the others, all at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from engine.batch.forward_graphs import capture_attention, capture_sliding, log_capture, round_up
from engine.batch.graph_inputs import GraphInputs, SlidingRoom
from engine.batch.round_batch import RoundBatch
from engine.batch.runner import Runner
from engine.batch.view import View
from engine.sampling.sampler import Sampler
from kernels.attention.base import GraphAttention
from kernels.ops import Graphs
from kernels.ragged import Ints
from kernels.transfer import send_all
from models.batch import SlidingKV, TokenInputs


@dataclass(frozen=True, slots=True)
class _Step:
    """One captured step. last: [rows] int64, index of each row's last query in `tokens`. chosen: [rows] int64, the
    sampled tokens."""

    tokens: TokenInputs
    attention: GraphAttention
    sliding: SlidingKV[GraphAttention] | None
    last: Tensor
    chosen: Tensor

    def plan(self, inputs: GraphInputs, first: int, end: int) -> None:
        """Plan attention. inputs: have this step's rows at places first … end - 1."""
        self.attention.plan(inputs.kv_lengths[first:end])
        if self.sliding is not None:
            self.sliding.attention.plan(inputs.sliding_kv_lengths[first:end])


@dataclass(frozen=True, slots=True)
class _Bucket:
    """Steps for a number of rows, shared by graphs of any number of steps.

    first, later: inputs of the first step, and of all others, whose rows follow each other step by step. chosen:
    [steps, rows] int64. temperature: [rows] float64. seeds: [rows] int64. replays: by (first step, last step + 1).
    """

    rows: int
    steps: list[_Step]
    first: GraphInputs
    later: GraphInputs
    chosen: Tensor
    temperature: Tensor
    seeds: Tensor
    replays: dict[tuple[int, int], Callable[[], None]]

    def plan(self, first: int, end: int) -> None:
        """Plan attention of steps `first` to end - 1."""
        for index in range(first, end):
            at = (index - 1) * self.rows if index else 0
            self.steps[index].plan(self.later if index else self.first, at, at + self.rows)

    def replay(self, first: int, end: int) -> None:
        """Replay steps `first` to end - 1."""
        self.plan(first, end)
        self.replays[first, end]()


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
        layers: int = 0,
        sliding: SlidingRoom | None = None,
    ) -> None:
        """Capture, for each of `rows`, each of `gammas` steps. All ranks that share the model do so at the same time.

        first: largest number of queries of a row in the first step; later steps have one. width, layers, sliding:
        see GraphInputs.
        """
        self._model, self._pool, self._graphs, self._sampler = runner.model, runner.pool, graphs, sampler
        self._window, self._sliding = runner.view.window, sliding
        self._rows, self._gammas = sorted(rows), sorted(gammas)
        self._first, self._width, self._layers = first, width, layers
        what = f"drafts of up to {self._gammas[-1]} tokens for up to {self._rows[-1]} rows"
        with log_capture(what, self._model.device):  # the largest first, so that the others fit into its memory
            self._buckets = {count: self._capture(count) for count in self._rows[::-1]}

    def draft(self, batch: RoundBatch, view: View, lag: Ints | None) -> bool:
        """Draft for all drafting rows of the round; see engine.speculation.drafters.draft. Returns False, and does
        nothing, where no graph fits."""
        rows, gamma = batch.num_drafting, batch.max_steps
        count = round_up(self._rows, rows)
        if count is None or gamma not in self._gammas or not self._sampler.is_plain(batch.row[:rows]):
            return False
        bucket = self._buckets[count]
        inputs = batch.draft_inputs(0, view, lag)
        if not bucket.first.fits(inputs):
            return False
        bucket.first.copy(inputs, np.arange(rows))
        samples = batch.draft_samples(range(gamma))
        bucket.temperature[:rows], bucket.seeds[:rows] = self._sampler.temperatures_and_seeds(samples.row_index[:rows])
        bucket.replay(0, 1)
        step, row = batch.drafts(range(gamma))
        places = step * count + row  # those of the first step are 0 … rows - 1
        if gamma > 1:
            bucket.later.copy(batch.later_draft_inputs(gamma, view), places[rows:] - count)
            bucket.replay(1, gamma)
        (place,) = send_all(bucket.chosen.device, places)
        batch.place_drafts(samples, bucket.chosen.view(-1)[place])
        return True

    def _capture(self, rows: int) -> _Bucket:
        device, steps = self._model.device, self._gammas[-1]
        make = partial(
            GraphInputs,
            self._pool,
            width=self._width,
            layers=self._layers,
            window=self._window,
            sliding=self._sliding,
        )
        first, later = make(rows=rows, queries=self._first), make(rows=rows * (steps - 1), queries=1)
        bucket = _Bucket(
            rows,
            [],
            first,
            later,
            torch.zeros(steps, rows, dtype=torch.int64, device=device),
            torch.zeros(rows, dtype=torch.float64, device=device),
            torch.zeros(rows, dtype=torch.int64, device=device),
            {},
        )
        for index in range(steps):
            part = later.part((index - 1) * rows, rows) if index else first.part(0, rows)
            attention = capture_attention(self._graphs, self._model, self._pool, part.batch)
            sliding = capture_sliding(self._graphs, self._model, self._sliding, part.sliding)
            last = torch.arange(rows, device=device) * part.batch.queries + part.batch.queries - 1
            bucket.steps.append(_Step(part.tokens, attention, sliding, last, bucket.chosen[index]))
        for begin, end in [*((1, gamma) for gamma in self._gammas[::-1] if gamma > 1), (0, 1)]:
            bucket.plan(begin, end)
            bucket.replays[begin, end] = self._graphs.capture(partial(self._work, bucket, begin, end))
        return bucket

    def _work(self, bucket: _Bucket, first: int, end: int) -> None:
        for index in range(first, end):
            step = bucket.steps[index]
            if index:
                step.tokens.token_ids.copy_(bucket.chosen[index - 1])
            states = self._model.states(step.tokens, self._pool, step.attention, step.last, step.sliding)
            position = step.tokens.positions[step.last] + 1
            sampled = self._sampler.sample(self._model.logits(states), bucket.temperature, bucket.seeds, position)
            step.chosen.copy_(sampled[1])
