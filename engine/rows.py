"""What a rank knows about its rows: tokens, page tables and lengths, in fixed-address tensors indexed by row slot.

A plan only patches them. `Rows.enter` turns a plan into a `Round`: the index tensors of one round, built from host
integers alone, so that nothing inside the round asks the device a question.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.plan import RowWork, StepPlan
from engine.speculation.policies import KVPolicy
from kernels.attention.base import AttentionBatch
from models.batch import ForwardBatch

Ints = npt.NDArray[np.int64]


class Rows:
    """State of all row slots of one rank.

    tokens: [max_rows, max_model_len] int32; drafts stand behind the committed tokens until they are committed or
        overwritten.
    page_table: [max_rows, max_pages] int64, page ids in order.
    computed: [max_rows] int64, committed tokens whose target KV is valid.
    """

    def __init__(self, *, max_rows: int, max_model_len: int, page_size: int, device: torch.device) -> None:
        self.page_size = page_size
        self.device = device
        self.tokens = torch.zeros(max_rows, max_model_len, dtype=torch.int32, device=device)
        self.page_table = torch.zeros(max_rows, -(-max_model_len // page_size), dtype=torch.int64, device=device)
        self.computed = torch.zeros(max_rows, dtype=torch.int64, device=device)

    def enter(self, plan: StepPlan) -> Round:
        """Apply the plan's changes and lay out its round."""
        for start in plan.starts:
            self.tokens[start.row, : len(start.tokens)] = torch.tensor(start.tokens, dtype=torch.int32)
            self.computed[start.row] = 0
        for delta in plan.pages:
            last = delta.first + len(delta.pages)
            self.page_table[delta.row, delta.first : last] = torch.tensor(delta.pages, dtype=torch.int64)
        return Round(self, plan.work)

    def batch(
        self, rows: Ints, computed: Ints, drafted: int, queries: Ints, policy: KVPolicy, logit_index: Ints
    ) -> ForwardBatch:
        """A forward over the next `queries[i]` tokens of row `rows[i]`, reading KV by `policy`.

        `drafted` tokens behind the committed ones have their (draft's) KV already. `computed` repeats, for shapes
        only, what the device's counters say; positions come from those counters.
        """
        total = int(queries.sum())
        row_slots = self.to_device(rows)
        row_index = self.to_device(np.repeat(rows, queries))
        offset = self.to_device(np.arange(total) - np.repeat(queries.cumsum() - queries, queries) + drafted)
        position = self.computed[row_index] + offset
        page = self.page_table[row_index, position // self.page_size]
        lengths = (computed + drafted + queries).tolist()
        return ForwardBatch(
            token_ids=self.tokens[row_index, position].long(),
            positions=position,
            slots=page * self.page_size + position % self.page_size,
            attention=AttentionBatch(
                query_lengths=queries.tolist(),
                kv_lengths=[policy.tokens_read(length) for length in lengths],
                pages=policy.pages(
                    self.page_table,
                    row_slots,
                    self.computed[row_slots] + self.to_device(queries) + drafted,
                    max(lengths),
                ),
            ),
            logit_index=self.to_device(logit_index),
        )

    def to_device(self, array: Ints) -> Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)


@dataclass(frozen=True, slots=True)
class Decisions:
    """Positions whose next token is decided, one logits row each.

    rows: host row slot of each; row_index: the same on the device, [n] int64.
    position: [n] int64, position of the token being decided.
    offset: [n] int64, how many drafted tokens stand between the committed ones and it; most_drafted: the largest.
    """

    rows: Ints
    row_index: Tensor
    position: Tensor
    offset: Tensor
    most_drafted: int


class Round:
    """The rows of one round, in the order of its plan: `work` sorted by falling gamma."""

    def __init__(self, state: Rows, work: list[RowWork]) -> None:
        self.state = state
        self._row = np.array([item.row for item in work], dtype=np.int64)
        self._computed = np.array([item.computed for item in work], dtype=np.int64)
        self._new = np.array([item.new for item in work], dtype=np.int64)
        self._gamma = np.array([item.gamma for item in work], dtype=np.int64)
        self._samples = np.array([item.samples for item in work], dtype=bool)
        self.gamma_max = int(self._gamma.max(initial=0))

        sampling = np.flatnonzero(self._samples)
        decided = self._gamma[sampling] + 1  # per sampling row: its drafts and one more
        offset = np.arange(int(decided.sum())) - np.repeat(decided.cumsum() - decided, decided)
        rows = np.repeat(self._row[sampling], decided)
        new = np.repeat(self._new[sampling], decided)
        self.decisions = self._decisions(rows, new + offset, offset)
        # [sampling rows, gamma_max + 1]: which decision stands where; padding repeats the row's last decision.
        steps = np.minimum(np.arange(self.gamma_max + 1), self._gamma[sampling][:, None])
        self.grid = state.to_device(steps + (decided.cumsum() - decided)[:, None])
        # [decisions]: which sampling row a decision belongs to. [sampling rows]: drafts asked for.
        self.owner = state.to_device(np.repeat(np.arange(len(sampling)), decided))
        self.gamma = state.to_device(self._gamma[sampling])
        self._sampling_index = state.to_device(sampling)

    def _decisions(self, rows: Ints, ahead: Ints, offset: Ints) -> Decisions:
        """ahead: how far behind the computed tokens the decided one stands."""
        to_device = self.state.to_device
        row_index = to_device(rows)
        position = self.state.computed[row_index] + to_device(ahead)
        return Decisions(rows, row_index, position, to_device(offset), int(offset.max(initial=0)))

    # -- drafting ----------------------------------------------------------------------------------------------------

    def draft_batch(self, step: int, policy: KVPolicy) -> tuple[ForwardBatch, Decisions]:
        """The forward that drafts token `step`, and what it decides: one query per drafting row."""
        count = int((self._gamma > step).sum())  # the first ones
        rows, ones = self._row[:count], np.ones(count, dtype=np.int64)
        batch = self.state.batch(rows, self._computed[:count], step, ones, policy, np.arange(count))
        return batch, self._decisions(rows, ones + step, ones * step)

    def place_drafts(self, decisions: Decisions, tokens: Tensor) -> None:
        """Put drafted `tokens` [n] where they would stand if accepted. Committed tokens are not touched."""
        self.state.tokens[decisions.row_index, decisions.position] = tokens.to(torch.int32)

    # -- verification ------------------------------------------------------------------------------------------------

    def verify_batch(self, policy: KVPolicy) -> ForwardBatch:
        """The target forward over every row's new tokens and, behind them, its drafts."""
        queries = self._new + self._gamma
        first = queries.cumsum() - queries
        decided = np.where(self._samples, self._gamma + 1, 0)
        within = np.arange(int(decided.sum())) - np.repeat(decided.cumsum() - decided, decided)
        logit_index = np.repeat(first + self._new - 1, decided) + within
        return self.state.batch(self._row, self._computed, 0, queries, policy, logit_index)

    def drafts(self) -> Tensor:
        """[sampling rows, gamma_max] int64: the drafted tokens, padded with whatever stands behind them."""
        decisions = self.decisions
        index = self.grid[:, : self.gamma_max]
        return self.state.tokens[decisions.row_index[index], decisions.position[index]].long()

    def commit(self, accepted: Tensor, tokens: Tensor) -> None:
        """Make the verdict the state: accepted [sampling rows], tokens [decisions] as the target chose them.

        Tokens behind the first disagreement are written too: they are beyond the committed length and count for
        nothing, just as the KV of rejected drafts does.
        """
        state, decisions = self.state, self.decisions
        state.tokens[decisions.row_index, decisions.position] = tokens.to(torch.int32)
        advance = state.to_device(self._new)
        advance[self._sampling_index] += accepted
        state.computed[state.to_device(self._row)] += advance
