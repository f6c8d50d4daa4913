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

from engine.kv.policies import View
from engine.plan import RowStart, RowWork, StepPlan
from kernels.attention.base import AttentionBatch
from kernels.ops import Ops
from kernels.reference import REFERENCE
from kernels.transfer import send
from models.batch import ForwardBatch

Ints = npt.NDArray[np.int64]


class Rows:
    """State of all row slots of one rank.

    tokens: [max_rows, max_model_len] int32; drafts stand behind the committed tokens until they are committed or
        overwritten.
    page_table: [max_rows, max_pages] int64, page ids in order.
    computed: [max_rows] int64, committed tokens whose target KV is valid.
    """

    def __init__(
        self, *, max_rows: int, max_model_len: int, page_size: int, device: torch.device, ops: Ops = REFERENCE
    ) -> None:
        """ops: of the device."""
        self.page_size = page_size
        self.device = device
        self.ops = ops
        self.tokens = torch.zeros(max_rows, max_model_len, dtype=torch.int32, device=device)
        self.page_table = torch.zeros(max_rows, -(-max_model_len // page_size), dtype=torch.int64, device=device)
        self.computed = torch.zeros(max_rows, dtype=torch.int64, device=device)

    def enter(self, plan: StepPlan) -> Round:
        """Apply the plan's changes and lay out its round."""
        for start in plan.starts:
            tokens = torch.tensor(start.tokens, dtype=torch.int32)
            self.tokens[start.row, : len(tokens)] = send(tokens, self.device)
            self.computed[start.row].fill_(start.computed)
        if plan.pages:
            counts = [len(delta.pages) for delta in plan.pages]
            row = np.repeat([delta.row for delta in plan.pages], counts)
            column = np.repeat([delta.first for delta in plan.pages], counts) + ragged(np.array(counts))
            page = np.concatenate([np.array(delta.pages, dtype=np.int64) for delta in plan.pages])
            row_index, columns, pages = self.to_device(np.stack([row, column, page]))
            self.page_table[row_index, columns] = pages
        return Round(self, plan)

    def forget(self, plan: StepPlan) -> None:
        """Empty the rows of a round that was given up, which ranks have left in different places: they hold the same
        again, until these rows start anew."""
        for work in plan.work:
            for held in (self.tokens, self.page_table, self.computed):
                held[work.row].zero_()

    def batch(
        self, rows: Ints, computed: Ints, ahead: Ints, queries: Ints, view: View, logit_index: Ints
    ) -> ForwardBatch:
        """A forward over `queries[i]` tokens of row `rows[i]`, from `ahead[i]` behind its computed ones (negative:
        before their end), that reads and writes KV through `view`.

        `computed` repeats, for shapes only, what the device's counters say; positions come from those counters.
        """
        row_slots = self.to_device(rows)
        row_index = self.to_device(np.repeat(rows, queries))
        offset = self.to_device(ragged(queries) + np.repeat(ahead, queries))
        position = self.computed[row_index] + offset
        page = view.page_table[row_index, position // self.page_size]
        first = computed + ahead + 1  # tokens that each row's first query sees at most
        skipped = [view.policy.skipped(context) for context in first.tolist()]
        read = [int(context) - out for context, out in zip(first + queries - 1, skipped, strict=True)]
        return ForwardBatch(
            token_ids=self.tokens[row_index, position].long(),
            positions=position,
            slots=page * self.page_size + position % self.page_size,
            attention=AttentionBatch(
                query_lengths=queries.tolist(),
                kv_lengths=read,
                pages=view.policy.pages(
                    view.page_table,
                    row_slots,
                    self.computed[row_slots] + self.to_device(ahead + 1),
                    -(-max(read) // self.page_size),
                ),
                skipped=skipped,
            ),
            logit_index=self.to_device(logit_index),
        )

    def to_device(self, array: Ints) -> Tensor:
        """Without waiting."""
        return send(torch.from_numpy(array), self.device)


def ragged(counts: Ints) -> Ints:
    """0 … counts[0] - 1, 0 … counts[1] - 1, and so on: where each item stands within its row."""
    return np.arange(int(counts.sum())) - np.repeat(counts.cumsum() - counts, counts)


@dataclass(frozen=True, slots=True)
class Decisions:
    """Positions whose next token is decided, one logits row each.

    rows: host row slot of each; row_index: the same on the device, [n] int64.
    position: [n] int64, position of the token being decided.
    drafted: host, how many drafted tokens stand between the committed ones and it; offset: the same on the device, [n]
        int64.
    """

    rows: Ints
    drafted: Ints
    row_index: Tensor
    position: Tensor
    offset: Tensor


class Round:
    """The rows of one round, in the order of its plan: `work` sorted by falling gamma.

    Host integers, [rows] each: row (slot), computed, new, gamma, catch_up and told as in RowWork, and which rows
    sample.
    starts: the requests that took a row slot in this round. budget: see StepPlan.
    decisions: whose next tokens the round decides. gamma_asked, [rows] int64, and ledger, [rows, 4] int64 (see
    kernels.acceptance), are on the device.
    """

    def __init__(self, state: Rows, plan: StepPlan) -> None:
        work: list[RowWork] = plan.work
        self.state = state
        self.starts: list[RowStart] = plan.starts
        self.budget = plan.budget
        self.row = np.array([item.row for item in work], dtype=np.int64)
        self.computed = np.array([item.computed for item in work], dtype=np.int64)
        self.new = np.array([item.new for item in work], dtype=np.int64)
        self.gamma = np.array([item.gamma for item in work], dtype=np.int64)
        self.catch_up = np.array([item.catch_up for item in work], dtype=np.int64)
        self.samples = np.array([item.samples for item in work], dtype=bool)
        self.told = np.array([item.told for item in work], dtype=np.int64)
        self.gamma_max = int(self.gamma.max(initial=0))

        self._decided = np.where(self.samples, self.gamma + 1, 0)  # a row's drafts and one more
        offset = ragged(self._decided)
        ahead = np.repeat(self.new, self._decided) + offset
        self.decisions = self._decisions(np.repeat(self.row, self._decided), ahead, offset)
        self.gamma_asked = state.to_device(self.gamma)
        first = self._decided.cumsum() - self._decided
        self.ledger = state.to_device(np.stack([self.row, self.new, first, self._decided], 1))

    @property
    def drafting(self) -> int:
        """How many rows draft: the first ones."""
        return int((self.gamma > 0).sum())

    def _decisions(self, rows: Ints, ahead: Ints, offset: Ints) -> Decisions:
        """ahead: how far behind the computed tokens the decided one stands."""
        to_device = self.state.to_device
        row_index = to_device(rows)
        position = self.state.computed[row_index] + to_device(ahead)
        return Decisions(rows, offset, row_index, position, to_device(offset))

    # -- drafting ----------------------------------------------------------------------------------------------------

    def draft_batch(self, step: int, view: View, behind: Ints | None = None) -> tuple[ForwardBatch, Decisions]:
        """The forward that drafts token `step`, and what it decides.

        behind: [drafting rows], how many committed tokens before the pending one have no KV in the draft's pool yet
        (first step only); None: the draft has it all, and each row is one query.
        """
        count = int((self.gamma > step).sum())  # the first ones
        rows, ones = self.row[:count], np.ones(count, dtype=np.int64)
        late = np.zeros(count, dtype=np.int64) if behind is None else behind
        queries = late + 1
        batch = self.state.batch(rows, self.computed[:count], step - late, queries, view, queries.cumsum() - 1)
        return batch, self._decisions(rows, ones + step, ones * step)

    def place_drafts(self, decisions: Decisions, tokens: Tensor) -> None:
        """Put drafted `tokens` [n] where they would stand if accepted. Committed tokens are not touched."""
        self.state.tokens[decisions.row_index, decisions.position] = tokens.to(torch.int32)

    # -- verification ------------------------------------------------------------------------------------------------

    def verify_batch(self, view: View) -> ForwardBatch:
        """The target forward over every row's new tokens and, behind them, its drafts."""
        queries = self.new + self.gamma
        first = queries.cumsum() - queries
        logit_index = np.repeat(first + self.new - 1, self._decided) + ragged(self._decided)
        if self.told.any():  # behind the decisions
            logit_index = np.concatenate([logit_index, np.repeat(first, self.told) + ragged(self.told)])
        return self.state.batch(self.row, self.computed, np.zeros_like(queries), queries, view, logit_index)

    def told_tokens(self) -> tuple[Ints, Tensor]:
        """Of prompt tokens that are to be told their log-probabilities, in the order of their logits: row slots, host
        [n], and the tokens, [n] int64."""
        rows = np.repeat(self.row, self.told)
        ahead = self.state.to_device(ragged(self.told) + 1)
        slots = self.state.to_device(rows)
        return rows, self.state.tokens[slots, self.state.computed[slots] + ahead].long()

    def drafts(self) -> Tensor:
        """[sampling rows, gamma_max] int64: the drafted tokens, padded with whatever stands behind them."""
        return self.state.tokens[self._draft_places()].long()

    def place(self, drafts: Tensor) -> None:
        """The reverse of `drafts`."""
        self.state.tokens[self._draft_places()] = drafts.to(torch.int32)

    def _draft_places(self) -> tuple[Tensor, Tensor]:
        """Padding repeats the place behind a row's drafts."""
        decided = self._decided[self.samples]
        steps = np.minimum(np.arange(self.gamma_max), decided[:, None] - 1)
        index = self.state.to_device(steps + (decided.cumsum() - decided)[:, None])
        return self.decisions.row_index[index], self.decisions.position[index]

    def accept(self, drafted: Tensor, chosen: Tensor) -> Tensor:
        """See kernels.acceptance.accept. drafted: [rows] int64. chosen: [decisions] int64, by the target. Returns
        [rows, 2 + most decisions of a row]."""
        state, most = self.state, int(self._decided.max(initial=0))
        return state.ops.accept(state.tokens, state.computed, self.ledger, drafted, chosen, most)

    def commit(self, verdict: Tensor) -> None:
        """See kernels.acceptance.commit. Counters only: rejected slots are simply not counted."""
        self.state.ops.commit(self.state.tokens, self.state.computed, self.ledger, verdict)

    def holding(self, accepted: Tensor) -> Tensor:
        """Which decisions stand, [decisions] bool. accepted: [rows]."""
        owner = self.state.to_device(np.repeat(np.arange(len(self.row)), self._decided))
        return self.decisions.offset <= accepted[owner]
