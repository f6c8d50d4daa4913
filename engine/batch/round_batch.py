"""The rows of one round as index tensors, laid out from its plan before the round begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.batch.row_state import RowState
from engine.batch.view import View
from engine.plan import RoundPlan, RowWork
from kernels.ragged import Ints, ragged_arange
from kernels.transfer import send_all
from models.batch import ForwardBatch


@dataclass(frozen=True, slots=True)
class SamplePositions:
    """Positions whose next token is sampled, one row of logits each. All have length n.

    rows: host, row slot of each. row_index: the same on the device, int64.
    position: int64, position of the token being sampled.
    drafted: host, number of drafted tokens between the committed ones and this one. offset: the same on the device,
        int64.
    """

    rows: Ints
    drafted: Ints
    row_index: Tensor
    position: Tensor
    offset: Tensor


class RoundBatch:
    """The rows of one round, in the order of its plan: `work` sorted by falling number of model drafts.

    row, computed, new, gamma, catch_up, draft_lag, num_prompt_logprobs: host, [rows], as in RowWork. sampling: host,
        [rows] bool, rows that sample.
    latest: host, [rows] bool, as in RowWork.
    num_proposed: host, [rows], number of drafts that the plan contains; a model drafts after them.
    max_steps: largest number of drafts that a model makes for a row: of forwards that draft.
    budget, drafter: see RoundPlan.
    samples: the positions that the round samples: of each sampling row its drafts' and one more.
    gamma_device: [rows] int64, gamma on the device.
    row_spans: [rows, 4] int64 on the device, the values of each row that acceptance and commit use:

        slot    the row's slot
        new     committed tokens that get their KV in the round
        first   index in `samples` of the row's first one
        count   how many it has there; 0 for a row that does not sample

        tokens of a row   [ committed ........................... ) drafts
                          [ computed .......... ) new ............ )^ the first sample
    """

    def __init__(self, state: RowState, plan: RoundPlan) -> None:
        """state: with the plan applied."""
        work: list[RowWork] = plan.work
        self.state = state
        self.budget, self.drafter = plan.budget, plan.drafter
        self.row = np.array([item.row for item in work], dtype=np.int64)
        self.computed = np.array([item.computed for item in work], dtype=np.int64)
        self.new = np.array([item.new for item in work], dtype=np.int64)
        self.gamma = np.array([item.gamma for item in work], dtype=np.int64)
        self.draft_lag = np.array([item.draft_lag for item in work], dtype=np.int64)
        self.catch_up = np.array([item.catch_up for item in work], dtype=np.int64)
        self.sampling = np.array([item.samples for item in work], dtype=bool)
        self.latest = np.array([item.latest for item in work], dtype=bool)
        self.num_prompt_logprobs = np.array([item.num_prompt_logprobs for item in work], dtype=np.int64)
        self.gamma_max = int(self.gamma.max(initial=0))
        self._proposed = [item.proposed for item in work]
        self.num_proposed = np.array([len(item.proposed) for item in work], dtype=np.int64)
        self._steps = self.gamma - self.num_proposed
        self.max_steps = int(self._steps.max(initial=0))

        self._num_samples = np.where(self.sampling, self.gamma + 1, 0)  # a row's drafts and one more
        offset = ragged_arange(self._num_samples)
        ahead = np.repeat(self.new, self._num_samples) + offset
        self.samples = self._sample_positions(np.repeat(self.row, self._num_samples), ahead, offset)
        self.gamma_device = state.to_device(self.gamma)
        first = self._num_samples.cumsum() - self._num_samples
        self.row_spans = state.to_device(np.stack([self.row, self.new, first, self._num_samples], 1))

    @property
    def num_drafting(self) -> int:
        """Number of rows that a model drafts for: the first ones."""
        return self._drafting(0)

    @property
    def max_samples(self) -> int:
        """Largest number of samples of a row."""
        return int(self._num_samples.max(initial=0))

    def _sample_positions(self, rows: Ints, ahead: Ints, offset: Ints) -> SamplePositions:
        """ahead: offset of each sampled token from its row's computed ones."""
        row_index, ahead_index, offset_index = send_all(self.state.device, rows, ahead, offset)
        return SamplePositions(rows, offset, row_index, self.state.computed[row_index] + ahead_index, offset_index)

    # -- drafting ----------------------------------------------------------------------------------------------------

    def place_proposals(self) -> None:
        """Write the drafts that the plan contains to the places they have if accepted."""
        tokens = [token for proposed in self._proposed for token in proposed]
        if tokens:
            rows, ahead = np.repeat(self.row, self.num_proposed), ragged_arange(self.num_proposed)
            samples = self._sample_positions(rows, ahead + 1, ahead)
            self.place_drafts(samples, self.state.to_device(np.array(tokens, dtype=np.int64)))

    def draft_inputs(self, step: int, view: View, lag: Ints | None = None) -> ForwardBatch:
        """Build the inputs of the forward that drafts token `step` after a row's proposed ones. Its logits are those of
        `draft_samples`.

        In the first step a row has a query for its pending token and each proposed one. lag: [drafting rows], number of
        committed tokens before the pending one that have no KV in the draft's pool yet (first step only); None: none is
        missing.
        """
        count = self._drafting(step)
        proposed = self.num_proposed[:count]
        if step:
            ahead, queries = proposed + step, np.ones(count, dtype=np.int64)
        else:
            missing = np.zeros(count, dtype=np.int64) if lag is None else lag
            ahead, queries = -missing, missing + proposed + 1
        last = queries.cumsum() - 1
        return self.state.forward_inputs(self.row[:count], self.computed[:count], ahead, queries, view, last)

    def drafts(self, steps: Sequence[int]) -> tuple[Ints, Ints]:
        """List the drafts of some steps, one step after another. Returns the step and the row of each, [n]: rows by
        their order in the round."""
        counts = np.array([self._drafting(step) for step in steps], dtype=np.int64)
        return np.repeat(np.array(steps, dtype=np.int64), counts), ragged_arange(counts)

    def later_draft_inputs(self, gamma: int, view: View) -> ForwardBatch:
        """Build the inputs of the forwards that draft tokens 1 to gamma - 1, as one batch with a query for each of
        `drafts`."""
        step, row = self.drafts(range(1, gamma))
        ones, no_logits = np.ones(len(row), dtype=np.int64), np.empty(0, dtype=np.int64)
        ahead = self.num_proposed[row] + step
        return self.state.forward_inputs(self.row[row], self.computed[row], ahead, ones, view, no_logits)

    def draft_samples(self, steps: Sequence[int]) -> SamplePositions:
        """Return the positions that the `drafts` of these steps are sampled at."""
        step, row = self.drafts(steps)
        drafted = self.num_proposed[row] + step
        return self._sample_positions(self.row[row], drafted + 1, drafted)

    def _drafting(self, step: int) -> int:
        """Return the number of rows that draft token `step`: the first ones."""
        return int((self._steps > step).sum())

    def place_drafts(self, samples: SamplePositions, tokens: Tensor) -> None:
        """Write drafted `tokens` [n] to the places they have if accepted. Committed tokens are not touched."""
        self.state.tokens[samples.row_index, samples.position] = tokens.to(torch.int32)

    def read_drafts(self) -> Tensor:
        """Return drafted tokens, [sampling rows, gamma_max] int64, padded with any tokens that follow them."""
        return self.state.tokens[self._draft_places()].long()

    def write_drafts(self, drafts: Tensor) -> None:
        """Reverse `read_drafts`."""
        self.state.tokens[self._draft_places()] = drafts.to(torch.int32)

    def _draft_places(self) -> tuple[Tensor, Tensor]:
        """Return the places of drafts. Padding repeats the place after a row's drafts."""
        counts = self._num_samples[self.sampling]
        steps = np.minimum(np.arange(self.gamma_max), counts[:, None] - 1)
        index = self.state.to_device(steps + (counts.cumsum() - counts)[:, None])
        return self.samples.row_index[index], self.samples.position[index]

    # -- verification ------------------------------------------------------------------------------------------------

    def verify_inputs(self, view: View) -> ForwardBatch:
        """Build the inputs of the target forward over every row's new tokens and, after them, its drafts.

        Logits are those of `samples` and, after them, of `prompt_tokens`.
        """
        queries = self.new + self.gamma
        first = queries.cumsum() - queries
        logit_index = np.repeat(first + self.new - 1, self._num_samples) + ragged_arange(self._num_samples)
        if self.num_prompt_logprobs.any():
            count = self.num_prompt_logprobs
            logit_index = np.concatenate([logit_index, np.repeat(first, count) + ragged_arange(count)])
        return self.state.forward_inputs(self.row, self.computed, np.zeros_like(queries), queries, view, logit_index)

    def prompt_tokens(self) -> tuple[Ints, Tensor]:
        """List the prompt tokens whose log-probabilities requests ask for, in the order of their logits.

        Returns their row slots (host, [n]) and the tokens ([n] int64).
        """
        rows = np.repeat(self.row, self.num_prompt_logprobs)
        ahead = self.state.to_device(ragged_arange(self.num_prompt_logprobs) + 1)
        slots = self.state.to_device(rows)
        return rows, self.state.tokens[slots, self.state.computed[slots] + ahead].long()

    def committed_samples(self, accepted: Tensor) -> Tensor:
        """Return a mask of the committed samples, [samples] bool: each row's accepted drafts and its bonus token.

        accepted: [rows].
        """
        owner = self.state.to_device(np.repeat(np.arange(len(self.row)), self._num_samples))
        return self.samples.offset <= accepted[owner]
