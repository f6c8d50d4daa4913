"""Drafts that read what the latest verify pass looked at (Vegas, arXiv 2602.07223).

A verify pass computes the softmax weights of all KV anyway. Two queries of each row vote with theirs: that of the
pending token, and that of the last draft, behind which the bonus token is sampled. Votes are summed over heads and over
the tokens of a page. A draft step then reads, in each layer, the sink, the pages with the most votes, and every token
that is newer than the choice: a view into the target's own pool, one list per layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from engine.batch.round_batch import RoundBatch
from engine.batch.view import View
from engine.config.kv import MAX_PLAIN_TOKENS, VerifiedConfig
from engine.kv.page_choice import ChoiceView, PageChoice
from engine.kv.policy import DraftSite, KVPolicy
from engine.plan import RowStart
from kernels.attention.base import AttentionBackend, AttentionBatch, Ballot
from kernels.kv_cache import LayerKV
from kernels.ragged import Ints
from kernels.transfer import send, send_all


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
        self._choice = PageChoice(
            site.state, site.model, count=config.budget // page, sink=-(-config.sink // page), per_head=False
        )
        budgets = [config.budget, *site.settings.kv_budgets(page)]
        self._views = {each: ChoiceView(self._choice, each // page) for each in budgets}
        self._views[0] = self._views[config.budget]
        self._prefill = np.zeros(site.max_rows, dtype=np.int64)  # number of tokens at a row's start
        self._plain_rounds = 0  # since the last vote
        # Largest number of tokens after a choice: the rest of a page, accepted drafts, and plain rounds.
        self._max_newer = page - 1 + site.settings.max_draft_tokens + MAX_PLAIN_TOKENS
        self.observer: VoteCount = VoteCount(self._choice, site.model.ops.best)

    def view(self, budget: int) -> View:
        return self._views[budget]

    def start(self, start: RowStart) -> None:
        self._prefill[start.row] = len(start.tokens)
        self._choice.clear(start.row)

    def prepare(self, batch: RoundBatch, end: Ints) -> None:
        """See KVPolicy.prepare. A row without a choice, or whose choice is too old, reads the most recent pages: one
        that was preempted may draft as soon as only its pending token is left, before it has voted."""
        rows, page = batch.row[: batch.num_drafting], self._state.page_size
        late = end - self._choice.ends[rows] * page > self._max_newer
        if late.any():
            self._choose_latest(rows[late], end[late] // page)

    def _choose_latest(self, rows: Ints, ends: Ints) -> None:
        """Choose the last ones of each row's first `ends` pages."""
        choice = self._choice
        choice.ends[rows] = ends
        latest = np.maximum(ends[:, None] - 1 - np.arange(choice.count), 0)
        row_index, device_ends, pages = send_all(self._state.device, rows, ends, latest.ravel())
        choice.device_ends[row_index] = device_ends
        choice.pages[:, row_index] = pages.view(latest.shape)

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

    def __init__(self, choice: PageChoice, best: Callable[[Tensor, int], Tensor]) -> None:
        """best: Ops.best."""
        self._choice, self._best = choice, best
        self._next: _Vote | None = None

    def vote(self, vote: _Vote | None) -> None:
        """Count votes of the next forward; None: count none."""
        self._next = vote

    def around(self, attention: AttentionBackend) -> AttentionBackend:
        """See Observer.around."""
        if self._next is None:
            return attention
        vote, self._next = self._next, None
        return _Voting(attention, self._choice, vote, self._best)


class _Voting:
    """Attention of one forward in which rows vote."""

    def __init__(
        self, inner: AttentionBackend, choice: PageChoice, vote: _Vote, best: Callable[[Tensor, int], Tensor]
    ) -> None:
        self._inner, self._choice, self._vote, self._best = inner, choice, vote, best
        self._ballot: Ballot
        self._excluded: Tensor

    def plan(self, batch: AttentionBatch) -> None:
        choice, vote = self._choice, self._vote
        rows, width = batch.pages.shape
        votes = torch.empty(rows, choice.kv_heads, width, device=batch.pages.device)
        self._ballot = Ballot(vote.voters, choice.page_size, votes)
        self._excluded = choice.excluded(vote.ends, width)
        choice.device_ends[vote.rows] = vote.ends
        self._inner.plan(replace(batch, ballot=self._ballot))

    def run(self, layer: LayerKV, q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """See PlannedAttention.run."""
        result = self._inner.run(layer, q, scale)
        # KV of a row that fails in this forward may be no numbers, and neither are its votes.
        votes = self._ballot.votes[self._vote.index].sum(1).nan_to_num_().masked_fill_(self._excluded, -1)
        count = min(self._choice.count, votes.shape[1])
        self._choice.pages[layer.index, self._vote.rows, :count] = self._best(votes, count)
        return result
