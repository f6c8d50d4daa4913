"""A target whose positions read sealed pages, and their own group of positions exactly (engine.batch.tail_pages).

A forward seals each group whose last position it computes, in each layer before attention reads it: a query of a later
group, in the same forward or any other, reads it sealed. If that last position was a draft and is rejected, a later
forward computes it anew, and seals the group again before anyone else can read it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from engine.batch.row_state import RowState
from kernels.attention.base import AttentionBackend, AttentionBatch, Ballot
from kernels.key_summaries import KeySummaries
from kernels.kv.kv_pool import LayerKV
from kernels.ragged import Ints, ragged_arange
from kernels.transfer import send_all


class SealedView:
    """View of all KV. Groups before that of a row's first query are listed as they are sealed, others exactly."""

    shares = True
    per_layer = False

    def __init__(self, state: RowState, window: int = 0) -> None:
        """window: see View."""
        self.page_table, self.first_page, self.window = state.page_table, state.first_exact, window
        self.sliding, self._state = state.windows, state

    def skipped(self, rows: Ints, contexts: Ints) -> Ints:
        return contexts * 0

    def leading(self, rows: Ints, contexts: Ints) -> Ints:
        return contexts

    def pages(self, rows: Tensor, contexts: Tensor, width: int) -> Tensor:
        state = self._state
        own = (contexts - 1) // state.page_size
        is_sealed = torch.arange(width, device=rows.device) < own[:, None]
        return torch.where(is_sealed, state.sealed_table[rows, :width], state.page_table[rows, :width])


@dataclass(frozen=True, slots=True)
class _Pieces:
    """Rows of a batch, cut where a group ends: what the queries of one group read.

    rows: [n], index of the row. columns: [n], the group. queries, lengths: [n], as in AttentionBatch. lasts: [rows],
    each row's last piece. All on the host.
    """

    rows: Ints
    columns: Ints
    queries: Ints
    lengths: Ints
    lasts: Ints

    @classmethod
    def cut(cls, queries: Ints, lengths: Ints, page: int) -> _Pieces:
        """queries, lengths: [rows], as in AttentionBatch. page: number of positions of a group."""
        first = (lengths - queries) // page
        counts = (lengths - 1) // page - first + 1
        rows = np.repeat(np.arange(len(counts)), counts)
        columns = np.repeat(first, counts) + ragged_arange(counts)
        ends = np.minimum((columns + 1) * page, lengths[rows])
        begins = np.maximum(columns * page, (lengths - queries)[rows])
        return cls(rows, columns, ends - begins, ends, counts.cumsum() - 1)


class SealedAttention:
    """Attention of the target's forwards, over lists of SealedView."""

    def __init__(self, inner: AttentionBackend, state: RowState, summaries: KeySummaries | None) -> None:
        """inner: reads what is listed. summaries: of the pool's keys, kept up to date."""
        self._inner, self._state = inner, state
        self.summaries = summaries
        self._written: Tensor
        self._sealing: tuple[Tensor, Tensor] | None = None
        self._ballots: tuple[Ballot, Ballot, Tensor] | None = None

    def plan(self, batch: AttentionBatch) -> None:
        state, page = self._state, self._state.page_size
        pieces = _Pieces.cut(np.array(batch.query_lengths), np.array(batch.kv_lengths), page)
        is_full = pieces.lengths == (pieces.columns + 1) * page
        slots = batch.rows
        assert slots is not None
        rows, columns, full_rows, full_columns, lasts = send_all(
            state.device, pieces.rows, pieces.columns, pieces.rows[is_full], pieces.columns[is_full], pieces.lasts
        )
        if self.summaries is not None:
            self._written = batch.pages[rows, columns]
        self._sealing = None
        if len(full_rows):
            at = slots[full_rows], full_columns
            self._sealing = state.page_table[at] - state.first_exact, state.sealed_table[at]
        self._ballots = None
        if len(pieces.rows) > len(batch.query_lengths):
            batch = self._cut(batch, pieces, slots[rows], rows, columns, lasts)
        self._inner.plan(batch)

    def _cut(
        self, batch: AttentionBatch, pieces: _Pieces, slots: Tensor, rows: Tensor, columns: Tensor, lasts: Tensor
    ) -> AttentionBatch:
        """Return a batch with the pieces as rows. Earlier groups of the same forward are sealed for the later ones."""
        width = batch.pages.shape[1]
        is_sealed = torch.arange(width, device=rows.device) < columns[:, None]
        lists = torch.where(is_sealed, self._state.sealed_table[slots, :width], batch.pages[rows])
        ballot = batch.ballot
        if ballot is not None:
            ballot = self._cut_ballot(ballot, pieces, lasts)
        return replace(
            batch,
            query_lengths=pieces.queries.tolist(),
            kv_lengths=pieces.lengths.tolist(),
            pages=lists,
            skipped=(),
            prefixes=(),
            ballot=ballot,
            rows=slots,
        )

    def _cut_ballot(self, ballot: Ballot, pieces: _Pieces, lasts: Tensor) -> Ballot:
        """Return a ballot for the last piece of each row. Voters in earlier ones do not vote."""
        (queries,) = send_all(self._state.device, pieces.queries[pieces.lasts])
        voters = ballot.voters.new_full((len(pieces.rows), 2), -1)
        voters[lasts] = torch.where(ballot.voters < queries[:, None], ballot.voters, -1)
        votes = ballot.votes.new_zeros(len(pieces.rows), *ballot.votes.shape[1:])
        cut = replace(ballot, voters=voters, votes=votes)
        self._ballots = ballot, cut, lasts
        return cut

    def run(self, layer: LayerKV, q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """See PlannedAttention.run."""
        if self.summaries is not None:
            self.summaries.update(layer, self._written)
        if self._sealing is not None:
            layer.seal(*self._sealing)
            if self.summaries is not None:
                self.summaries.seal(layer, *self._sealing)
        result = self._inner.run(layer, q, scale)
        if self._ballots is not None:
            ballot, cut, lasts = self._ballots
            ballot.votes.copy_(cut.votes[lasts])
        return result
