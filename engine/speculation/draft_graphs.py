"""All steps of drafting in two graphs: what a step chooses is what the next one is fed, and no one asks the host.

A step of a small model is done in less time than the host takes to launch its kernels one by one, or to choose a token
in between. What each step reads is known before the first one runs, but for the tokens. The first step is a graph of
its own, so that the device is busy with it while the host gets the others ready.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from engine.batch.forward_graphs import Frame, at_least, reported
from engine.batch.rows import Decisions, Ints, Round
from engine.kv.policies import View
from engine.sampling.sampler import Sampler
from kernels.kv_cache import KVPool
from kernels.ops import Graphs
from models.batch import ForwardBatch
from models.llama import Llama


@dataclass(frozen=True, slots=True)
class _Step:
    """frame: what the step's forward reads. last: [rows] int64, where in the frame each row's last query stands.
    position: [rows] int64, of what is decided. chosen: [rows] int64, the tokens decided on."""

    frame: Frame
    last: Tensor
    position: Tensor
    chosen: Tensor

    def put(self, batch: ForwardBatch, decisions: Decisions) -> None:
        """What the next replay computes."""
        self.frame.put(batch)
        self.last[: len(batch.logit_index)] = batch.logit_index
        self.position[: len(decisions.position)] = decisions.position


@dataclass(frozen=True, slots=True)
class _Bucket:
    """Steps for a number of rows, which graphs of any number of steps share. temperature: [rows] float64; seeds: [rows]
    int64. replays: by which steps, from the first that it does to the one behind its last."""

    steps: list[_Step]
    temperature: Tensor
    seeds: Tensor
    replays: dict[tuple[int, int], Callable[[], None]]


class DraftGraphs:
    """Of one model over one pool that has a scratch page."""

    def __init__(
        self,
        model: Llama,
        pool: KVPool,
        graphs: Graphs,
        sampler: Sampler,
        *,
        rows: Iterable[int],
        gammas: Iterable[int],
        first: int,
        width: int,
    ) -> None:
        """Captures, for each of `rows`, what makes each of `gammas` steps. All ranks that share the model do so at the
        same time.

        first: queries of a row in the first step, at most; the others have one. width: most pages that a row's list
        has.
        """
        self._model, self._pool, self._graphs, self._sampler = model, pool, graphs, sampler
        self._rows, self._gammas = sorted(rows), sorted(gammas)
        self._first, self._width = first, width
        what = f"drafts of up to {self._gammas[-1]} tokens for up to {self._rows[-1]} rows"
        with reported(what, model.device):  # the largest first, so that the others fit into its memory
            self._buckets = {count: self._capture(count) for count in self._rows[::-1]}

    def draft(self, rows: Round, view: View, behind: Ints | None) -> bool:
        """Draft for all rows of the round that ask for it; see engine.speculation.drafters.draft. False, and nothing is
        done, where no graph can."""
        count = at_least(self._rows, rows.drafting)
        if count is None or rows.gamma_max not in self._gammas or not self._sampler.by_rule(rows.row[: rows.drafting]):
            return False
        bucket, gamma = self._buckets[count], rows.gamma_max
        planned = [rows.draft_batch(0, view, behind)]
        batch, decisions = planned[0]
        if not bucket.steps[0].frame.fits(batch):
            return False
        temperature, seeds = self._sampler.asked(decisions)
        bucket.temperature[: rows.drafting], bucket.seeds[: rows.drafting] = temperature, seeds
        bucket.steps[0].put(batch, decisions)
        bucket.replays[0, 1]()
        for step in range(1, gamma):
            planned.append(rows.draft_batch(step, view))
            bucket.steps[step].put(*planned[step])
        if gamma > 1:
            bucket.replays[1, gamma]()
        for taken, (_, decisions) in zip(bucket.steps, planned, strict=False):
            rows.place_drafts(decisions, taken.chosen[: len(decisions.position)])
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
        frame = Frame(self._model, self._pool, self._graphs, rows=rows, queries=queries, width=self._width)
        position, chosen = torch.zeros(2, rows, dtype=torch.int64, device=self._model.device)
        return _Step(frame, torch.arange(rows, device=self._model.device), position, chosen)

    def _work(self, bucket: _Bucket, first: int, end: int) -> None:
        for index in range(first, end):
            step = bucket.steps[index]
            if index:
                step.frame.ids.copy_(bucket.steps[index - 1].chosen)
            states = self._model.states(step.frame.batch, self._pool, step.frame.attention, step.last)
            logits = self._model.logits(states)
            step.chosen.copy_(self._sampler.rule(logits, bucket.temperature, bucket.seeds, step.position))
