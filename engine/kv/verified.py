"""Drafts that read what the latest verify pass looked at (Vegas, arXiv 2602.07223).

A verify pass computes the softmax weights of all KV anyway. Two queries of each row vote with theirs: that of the
pending token, and that of the last draft, behind which the bonus token is sampled. Votes are summed over heads and over
the tokens of a page. A draft step then reads, in each layer, the sink, the pages with the most votes, and every token
that is newer than the choice: a view into the target's own pool, one list per layer.

    row of 12 pages, sink 1, budget of 3 pages, chosen when it had 10 full pages:

    [0] 1 [2] 3 4 [5] 6 7 [8] 9 [10 11)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from engine.batch.row_state import RowState
from engine.batch.view import View
from engine.config.kv import MAX_PLAIN_TOKENS, VerifiedConfig
from engine.kv.policy import DraftSite, KVPolicy
from engine.plan import RowStart
from kernels.attention.base import AttentionBackend, AttentionBatch, Ballot
from kernels.kv_cache import LayerKV
from kernels.ragged import Ints
from kernels.transfer import send, send_all
from models.llama import Llama


class PageChoice:
    """Pages that are chosen for each row slot, and the views that list them.

    pages: [layers, max_rows, count] int64, indices into a row's page table, those with the most votes first. Of a row
        with fewer pages to choose from, only that many are valid.
    ends: [max_rows], on the host: number of a row's pages when they were chosen, all full and committed; 0: not yet.
    """

    def __init__(self, state: RowState, model: Llama, count: int, sink: int) -> None:
        """count: number of pages to choose. sink: number of first pages that are always read."""
        self.count, self.sink, self.kv_heads = count, sink, model.kv_heads
        self.page_table = state.page_table
        max_rows = len(state.page_table)
        self.pages = torch.zeros(model.num_layers, max_rows, count, dtype=torch.int64, device=state.device)
        self.ends = np.zeros(max_rows, dtype=np.int64)
        self.device_ends = torch.zeros(max_rows, dtype=torch.int64, device=state.device)


class ChoiceView:
    """View of the sink, of the best chosen pages, and of all that is newer."""

    per_layer = True

    def __init__(self, choice: PageChoice, page_size: int, count: int) -> None:
        """count: number of chosen pages to read, at most choice.count."""
        self._choice = choice
        self._page_size, self._count = page_size, count
        self.page_table = choice.page_table

    def skipped(self, rows: Ints, contexts: Ints) -> Ints:
        candidates = np.maximum(self._choice.ends[rows] - self._choice.sink, 0)
        skipped: Ints = np.maximum(candidates - self._count, 0) * self._page_size
        return skipped

    def leading(self, rows: Ints, contexts: Ints) -> Ints:
        leading: Ints = np.where(self.skipped(rows, contexts) > 0, self._choice.sink * self._page_size, contexts)
        return leading

    def pages(self, rows: Tensor, contexts: Tensor, width: int) -> Tensor:
        sink, chosen = self._choice.sink, self._choice.pages[:, rows, : self._count]
        candidates = (self._choice.device_ends[rows] - sink).clamp_(min=0)[:, None]
        count = candidates.clamp(max=self._count)
        column = torch.arange(width, device=rows.device)
        # Below the sink, and where all candidates are read, a column is its own index.
        columns = column + torch.where(column < sink, 0, candidates - count)
        reads_chosen = (column >= sink) & (column < sink + count) & (candidates > count)
        place = (column - sink).clamp(0, self._count - 1)
        columns = torch.where(reads_chosen, chosen[..., place], columns)
        return self.page_table[rows[:, None], columns.clamp_(max=self.page_table.shape[1] - 1)]


@dataclass(frozen=True, slots=True)
class _Vote:
    """What happens in the next forward: which of its rows vote, and what they choose from.

    voters: [rows of the batch, 2], see Ballot. index: [n], which of these rows vote. rows: [n], their row slots. ends:
    [n], numbers of full pages of committed tokens. All int64 on the device.
    """

    voters: Tensor
    index: Tensor
    rows: Tensor
    ends: Tensor


class VerifiedPolicy(KVPolicy):
    """A view of the target's pool, of pages that its verify passes choose."""

    def __init__(self, site: DraftSite, config: VerifiedConfig) -> None:
        super().__init__(site)
        page = site.page_size
        self._state = site.state
        self._choice = PageChoice(site.state, site.model, config.budget // page, -(-config.sink // page))
        budgets = [config.budget, *site.settings.kv_budgets(page)]
        self._views = {each: ChoiceView(self._choice, page, each // page) for each in budgets}
        self._views[0] = self._views[config.budget]
        self._prefill = np.zeros(site.max_rows, dtype=np.int64)  # number of tokens at a row's start
        self._plain_rounds = 0  # since the last vote
        self.observer: VoteCount = VoteCount(self._choice, page, site.model.ops.best)

    def view(self, budget: int) -> View:
        return self._views[budget]

    def start(self, start: RowStart) -> None:
        self._prefill[start.row] = len(start.tokens)
        self._choice.ends[start.row] = 0
        self._choice.device_ends[start.row].fill_(0)

    def watch(self, rows: Ints, first: Ints, queries: Ints, drafts: Ints) -> None:
        """Let rows vote in the next forward: all that sample, if any of them drafts or ends its prompt; else after
        MAX_PLAIN_TOKENS forwards without."""
        committed = first + queries - drafts
        samples = committed >= self._prefill[rows]
        self._plain_rounds += 1
        calls = drafts.any() or (samples & (first < self._prefill[rows])).any()
        if not calls and self._plain_rounds <= MAX_PLAIN_TOKENS:
            self.observer.vote(None)
            return
        self._plain_rounds = 0
        # The pending token's query, and the last draft's; without drafts they are the same one.
        voters = np.stack([np.where(samples, drafts, -1), np.where(samples & (drafts > 0), 0, -1)], 1)
        index = np.flatnonzero(samples)
        ends = committed[index] // self._state.page_size
        self._choice.ends[rows[index]] = ends
        device = self._state.device
        self.observer.vote(_Vote(send(torch.from_numpy(voters), device), *send_all(device, index, rows[index], ends)))


class VoteCount:
    """Observer that counts votes in the next forward, and chooses after each layer."""

    def __init__(self, choice: PageChoice, page_size: int, best: Callable[[Tensor, int], Tensor]) -> None:
        """best: Ops.best."""
        self._choice, self._page_size, self._best = choice, page_size, best
        self._next: _Vote | None = None

    def vote(self, vote: _Vote | None) -> None:
        """Count votes of the next forward; None: count none."""
        self._next = vote

    def around(self, attention: AttentionBackend) -> AttentionBackend:
        """See Observer.around."""
        if self._next is None:
            return attention
        vote, self._next = self._next, None
        return _Voting(attention, self._choice, vote, self._page_size, self._best)


class _Voting:
    """Attention of one forward in which rows vote."""

    def __init__(
        self,
        inner: AttentionBackend,
        choice: PageChoice,
        vote: _Vote,
        page_size: int,
        best: Callable[[Tensor, int], Tensor],
    ) -> None:
        self._inner, self._choice, self._vote = inner, choice, vote
        self._page_size, self._best = page_size, best
        self._ballot: Ballot
        self._excluded: Tensor

    def plan(self, batch: AttentionBatch) -> None:
        choice, vote = self._choice, self._vote
        rows, width = batch.pages.shape
        votes = torch.empty(rows, choice.kv_heads, width, device=batch.pages.device)
        self._ballot = Ballot(vote.voters, self._page_size, votes)
        page = torch.arange(width, device=votes.device)
        self._excluded = (page < choice.sink) | (page >= vote.ends[:, None])
        choice.device_ends[vote.rows] = vote.ends
        self._inner.plan(replace(batch, ballot=self._ballot))

    def run(self, layer: LayerKV, q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """See PlannedAttention.run."""
        result = self._inner.run(layer, q, scale)
        votes = self._ballot.votes[self._vote.index].sum(1).masked_fill_(self._excluded, -1)
        count = min(self._choice.count, votes.shape[1])
        self._choice.pages[layer.index, self._vote.rows, :count] = self._best(votes, count)
        return result
