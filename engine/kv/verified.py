"""Drafts that read what the latest verify pass looked at (Vegas, arXiv 2602.07223).

A verify pass computes the softmax weights of all KV anyway. Two queries of each row vote with theirs: that of the
pending token, and that of the last draft, behind which the bonus token is sampled. Votes are summed over heads and over
the tokens of a page. A draft step then reads, in each layer, the sink, the pages with the most votes, and every token
that is newer than the choice: a view into the target's own pool, one list per layer. A row may read as many of the
latest pages in their place, as with sink + window, while a controller finds that more of its drafts are accepted then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.batch.forward_graphs import GraphWatch
from engine.batch.round_batch import RoundBatch
from engine.batch.view import View
from engine.config.kv import MAX_PLAIN_TOKENS, VerifiedConfig
from engine.kv.page_choice import ChoiceView, PageChoice
from engine.kv.policy import DraftSite, KVPolicy, views_by_budget
from engine.plan import RowStart
from kernels.attention.base import AttentionBackend, AttentionBatch, Ballot, GraphAttention, GraphBatch, SharedPrefix
from kernels.kv.kv_pool import LayerKV
from kernels.ragged import Ints
from kernels.transfer import send, send_all


class _Vote(NamedTuple):
    """Rows of a forward that vote. All int64.

    voters: [rows of the batch, 2], see Ballot. slots: [rows of the batch], the row slot that chooses by them, one that
    no request has (PageChoice.nobody) for rows that do not vote. ends: [rows of the batch], number of full pages of
    committed tokens to choose from.
    """

    voters: Tensor
    slots: Tensor
    ends: Tensor


def _split(numbers: Tensor) -> _Vote:
    """View numbers, [4 * rows], as the vote of so many rows."""
    rows = len(numbers) // 4
    return _Vote(numbers[: 2 * rows].view(rows, 2), numbers[2 * rows : 3 * rows], numbers[3 * rows :])


class VerifiedPolicy(KVPolicy):
    """A view of the target's pool, of pages that its verify passes choose."""

    def __init__(self, site: DraftSite, config: VerifiedConfig) -> None:
        super().__init__(site)
        page = site.page_size
        self._state = site.state
        self._choice = PageChoice(
            site.page_table, page, site.model, count=config.budget // page, sink=-(-config.sink // page), per_head=False
        )
        self._views = views_by_budget(
            site, config.budget, lambda budget: ChoiceView(self._choice, budget // page, site.first_page, site.sliding)
        )
        self._prefill = np.zeros(site.max_rows, dtype=np.int64)  # number of tokens at a row's start
        self._plain_rounds = 0  # since the last vote
        # Largest number of tokens after a choice, before anything new is drafted.
        max_gamma = site.settings.max_draft_tokens
        self._max_newer = page - 1 + config.max_newer_tokens(max_gamma) - max_gamma
        self.observer: VoteCount = VoteCount(self._choice, site.model.ops.best)

    def view(self, budget: int) -> View:
        return self._views[budget]

    def start(self, start: RowStart) -> None:
        self._prefill[start.row] = len(start.tokens)
        self._choice.clear(start.row)

    def prepare(self, batch: RoundBatch, end: Ints) -> None:
        """See KVPolicy.prepare. The most recent pages are read by rows for which the plan says so, and by a row without
        a choice, or whose choice is too old, though it counts as chosen: one that was preempted may draft as soon as
        only its pending token is left, before it has voted."""
        count, page = batch.num_drafting, self._state.page_size
        rows = batch.row[:count]
        late = batch.latest[:count] | (end - self._choice.ends[rows] * page > self._max_newer)
        if late.any():
            self._choose_latest(rows[late], end[late] // page)

    def _choose_latest(self, rows: Ints, ends: Ints) -> None:
        """Choose the last ones of each row's first `ends` pages."""
        choice = self._choice
        choice.ends[rows] = ends
        latest = np.maximum(ends[:, None] - 1 - np.arange(choice.count), 0)
        row_index, device_ends, pages = send_all(self._state.device, rows, ends, latest.ravel())
        choice.device_ends[row_index] = device_ends
        choice.pages[:, row_index] = pages.view(latest.shape).int()

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
        ends = committed // self._state.page_size
        self._choice.ends[rows[samples]] = ends[samples]
        slots = np.where(samples, rows, self._choice.nobody)
        self.observer.vote(_Vote(torch.from_numpy(voters), torch.from_numpy(slots), torch.from_numpy(ends)))


class VoteCount:
    """Observer that counts votes in the next forward, and chooses after each layer."""

    def __init__(self, choice: PageChoice, best: Callable[[Tensor, int], Tensor]) -> None:
        """best: Ops.best."""
        self._choice, self._best = choice, best
        self._next: _Vote | None = None

    def vote(self, vote: _Vote | None) -> None:
        """Count votes of the next forward. vote: on the host; None: count none."""
        self._next = vote

    @property
    def due(self) -> bool:
        """See Observer.due."""
        return self._next is not None

    def around(self, attention: AttentionBackend) -> AttentionBackend:
        """See Observer.around."""
        assert self._next is not None
        vote, self._next = self._next, None
        device = self._choice.pages.device
        return _Voting(attention, self, _Vote(*(send(part, device) for part in vote)))

    def in_graph(self, rows: int, queries: int, width: int) -> GraphWatch | None:
        """See Observer.in_graph. Rows that decode plainly vote so seldom that no graph does it for them."""
        return _GraphVotes(self, rows, width) if queries > 1 else None

    def take(self) -> _Vote | None:
        """Return the vote of the next forward, and forget it."""
        vote, self._next = self._next, None
        return vote

    def ballot(self, vote: _Vote, width: int) -> Ballot:
        """Make the ballot of a vote. width: number of pages in a row's list."""
        size = (len(vote.voters), self._choice.kv_heads, width)
        return Ballot(vote.voters, self._choice.page_size, torch.zeros(size, device=vote.voters.device))

    def begin(self, vote: _Vote, width: int) -> Tensor:
        """Record which pages rows choose from; all layers do so in the same forward. width: number of pages in a row's
        list. Returns a mask of the pages that cannot be chosen, [rows, width] bool."""
        self._choice.device_ends[vote.slots] = vote.ends
        return self._choice.excluded(vote.ends, width)

    def choose(self, layer: LayerKV, vote: _Vote, votes: Tensor, excluded: Tensor) -> None:
        """Choose the pages with the most votes. votes: see Ballot. excluded: see `begin`."""
        # KV of a row that fails in this forward may be no numbers, and neither are its votes.
        sums = votes.sum(1).nan_to_num_().masked_fill_(excluded, -1)
        count = min(self._choice.count, sums.shape[1])
        self._choice.pages[layer.index, vote.slots, :count] = self._best(sums, count).int()


class _Voting:
    """Attention of one forward in which rows vote."""

    def __init__(self, inner: AttentionBackend, count: VoteCount, vote: _Vote) -> None:
        self._inner, self._count, self._vote = inner, count, vote
        self._ballot: Ballot
        self._excluded: Tensor

    def plan(self, batch: AttentionBatch) -> None:
        # Another policy that learns from the same forward has the same voters.
        self._ballot = batch.ballot or self._count.ballot(self._vote, batch.pages.shape[1])
        self._excluded = self._count.begin(self._vote, batch.pages.shape[1])
        self._inner.plan(replace(batch, ballot=self._ballot))

    def run(self, layer: LayerKV, q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """See PlannedAttention.run."""
        result = self._inner.run(layer, q, scale)
        self._count.choose(layer, self._vote, self._ballot.votes, self._excluded)
        return result


class _GraphVotes:
    """Votes in one captured forward. The first rows are those of the batch; others do not vote."""

    def __init__(self, count: VoteCount, rows: int, width: int) -> None:
        choice = count._choice
        others = torch.full((rows,), choice.nobody), torch.zeros(rows, dtype=torch.int64)
        self._nobody = torch.cat([torch.full((2 * rows,), -1), *others])
        self._numbers = self._nobody.to(choice.pages.device, copy=True)
        self._vote = _split(self._numbers)
        self._count = count
        self.ballot = count.ballot(self._vote, width)

    def copy(self) -> None:
        """See GraphWatch.copy."""
        numbers = self._nobody.clone()
        if (vote := self._count.take()) is not None:
            for part, mine in zip(vote, _split(numbers), strict=True):
                mine[: len(part)] = part
        self._numbers.copy_(send(numbers, self._numbers.device))

    def around(self, attention: GraphAttention, batch: GraphBatch) -> GraphAttention:
        """See GraphWatch.around."""
        return _CapturedVoting(attention, self._count, self._vote, self.ballot)


class _CapturedVoting:
    """Attention of a captured forward in which rows vote."""

    def __init__(self, inner: GraphAttention, count: VoteCount, vote: _Vote, ballot: Ballot) -> None:
        self._inner, self._count, self._vote, self._ballot = inner, count, vote, ballot
        self._excluded: Tensor

    def plan(self, kv_lengths: Sequence[int], prefixes: Sequence[SharedPrefix] = ()) -> None:
        self._inner.plan(kv_lengths, prefixes)

    def run(self, layer: LayerKV, q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """See PlannedAttention.run."""
        result = self._inner.run(layer, q, scale)
        if layer.index == 0:
            self._excluded = self._count.begin(self._vote, self._ballot.votes.shape[2])
        self._count.choose(layer, self._vote, self._ballot.votes, self._excluded)
        return result
