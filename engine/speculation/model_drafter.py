"""Drafting with a separate, smaller model of the same vocabulary."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from engine.batch.round_batch import RoundBatch
from engine.batch.row_state import RowState
from engine.batch.runner import Runner
from engine.kv.policy import KVPolicy
from engine.plan import RowStart
from engine.sampling.sampler import Sampler
from engine.speculation.draft_graphs import DraftGraphs
from engine.speculation.drafters import Drafter, draft
from engine.speculation.verify import Verdict
from kernels.ragged import Ints
from parallel.group import Group


class ModelDrafter:
    """Drafter over a draft model with KV of its own, which computes every token that the target commits before it
    drafts.

    It does so on demand: rows that do not draft cost nothing, and the plan contains the number of tokens that are
    computed before a row drafts (all that are missing, or a part if they are too many for one round). A row that drafts
    round after round lacks only its pending token, or one more if all drafts of the previous round were accepted: the
    last of them was proposed but never fed. Both are fed together.
    """

    def __init__(
        self,
        state: RowState,
        full: Runner,
        runner: Runner,
        sampler: Sampler,
        policy: KVPolicy,
        *,
        block: int,
        graphs: DraftGraphs | None = None,
    ) -> None:
        """full: the draft model as it reads while it computes prompts. runner: as it reads while it drafts. sampler:
        the draft model's own. block: largest number of tokens of all rows in one forward over prompts. graphs: replay
        all draft steps of a round.
        """
        self._state = state
        self._full = full
        self._runner = runner
        self._sampler = sampler
        self._policy = policy
        self._row_block, self._block = policy.block or block, block
        self._graphs = graphs

    def start(self, start: RowStart) -> None:
        self._sampler.start(start)
        self._policy.start(start)

    def propose(self, batch: RoundBatch) -> Tensor:
        computed = batch.computed - batch.draft_lag
        self._compute(batch, computed, computed + batch.catch_up)
        computed += batch.catch_up
        count = batch.num_drafting
        if count:
            rows, computed = batch.row[:count], computed[:count]
            self._policy.prepare(batch, computed)
            lag = batch.computed[:count] - computed
            view = self._policy.view(batch.budget)
            draft(batch, self._runner, view, self._sampler, self._graphs, lag if lag.any() else None)
            self._policy.keep_drafts(rows, computed, batch.computed[:count] + batch.gamma[:count])
        return batch.gamma_device

    def _compute(self, batch: RoundBatch, computed: Ints, end: Ints) -> None:
        """Compute the KV of each row's tokens computed … end - 1."""
        for index, first, tokens in self._blocks(computed, end):
            slots = batch.row[index]
            self._policy.watch(slots, first, tokens, np.zeros_like(tokens))
            ahead = first - batch.computed[index]
            no_logits = np.empty(0, dtype=np.int64)
            self._full.forward(
                self._state.forward_inputs(slots, batch.computed[index], ahead, tokens, self._full.view, no_logits)
            )

    def _blocks(self, computed: Ints, end: Ints) -> Iterator[tuple[Ints, Ints, Ints]]:
        """Split missing tokens into forwards: the rows of each, their first token, and their number of tokens."""
        computed = computed.copy()
        while len(late := np.flatnonzero(computed < end)):
            tokens = np.minimum(end[late] - computed[late], self._row_block)
            before = tokens.cumsum() - tokens
            tokens = np.minimum(tokens, self._block - before)
            taken = tokens > 0
            late, tokens = late[taken], tokens[taken]
            yield late, computed[late], tokens
            computed[late] += tokens

    def observe(self, batch: RoundBatch, verdict: Verdict) -> None:
        self._sampler.count_tokens(batch, verdict.target_tokens, verdict.accepted)


class SharedDrafts:
    """Drafter that sends the drafts to ranks without the draft model as well; O(rows × gamma) traffic per round."""

    def __init__(self, drafter: Drafter | None, group: Group) -> None:
        """drafter: this rank's, if it has one. Rank 0 has one, which proposes as many tokens as the plan contains.
        group: all ranks of the target."""
        self._drafter = drafter
        self._group = group

    def start(self, start: RowStart) -> None:
        if self._drafter is not None:
            self._drafter.start(start)

    def propose(self, batch: RoundBatch) -> Tensor:
        if self._drafter is not None:
            self._drafter.propose(batch)
        if batch.max_steps:  # all ranks have the drafts found in the text
            drafts = batch.read_drafts()
            batch.write_drafts(self._group.all_reduce(drafts if self._group.rank == 0 else torch.zeros_like(drafts)))
        return batch.gamma_device

    def observe(self, batch: RoundBatch, verdict: Verdict) -> None:
        if self._drafter is not None:
            self._drafter.observe(batch, verdict)
