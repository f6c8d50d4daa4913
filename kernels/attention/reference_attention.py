"""Attention in plain torch for any device, dtype and page size: the oracle that every other backend must agree with.

Scores, softmax and sums are computed in float32 (float64 for float64 inputs) whatever the pool's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.attention.base import AttentionBatch, Ballot
from kernels.kv.kv_pool import LayerKV
from kernels.transfer import send

_QUERY_BLOCK = 128  # queries of one row scored at a time: bounds the score matrix of a prefill chunk
_GROUP_SLOTS = 16384  # padded KV slots gathered at a time: bounds the copy of a batch


@dataclass(frozen=True, slots=True)
class _Piece:
    """Queries [first, first + n) of the batch, all of one row, with that row's first `length` slots."""

    first: int
    n: int
    row: int
    length: int


@dataclass(frozen=True, slots=True)
class _Group:
    """Pieces with equal numbers of queries, padded to the longest and attended together.

    rows: [pieces] index into the batch's rows.
    queries: [pieces, n] index into the batch's tokens.
    length: slots read per piece, before masking.
    unmasked: slots below this are visible to every query.
    hidden: [pieces, 1, 1, n, length - unmasked] True where a slot is masked for a query.
    """

    rows: Tensor
    queries: Tensor
    length: int
    unmasked: int
    hidden: Tensor


class ReferenceAttention:
    """`AttentionBackend` by gather, two matrix products and a softmax.

    Rows of similar length are padded together, so that a batch of short rows costs a few torch calls, not a few per
    row. Long prefill chunks are cut into blocks of queries, each of which reads only the prefix that it sees.
    """

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._groups: list[_Group] = []
        self._batch: AttentionBatch

    def plan(self, batch: AttentionBatch) -> None:
        self._batch = batch
        pieces = []
        first = 0
        for row, (n, length) in enumerate(zip(batch.query_lengths, batch.kv_lengths, strict=True)):
            for start in range(0, n, _QUERY_BLOCK):
                stop = min(start + _QUERY_BLOCK, n)
                pieces.append(_Piece(first + start, stop - start, row, length - n + stop))
            first += n
        pieces.sort(key=lambda piece: (piece.n, piece.length))
        self._groups = [_pad(members, batch.window, batch.pages.device) for members in _similar(pieces)]

    def run(self, layer: LayerKV, q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """See AttentionBackend.run."""
        compute = torch.float64 if q.dtype == torch.float64 else torch.float32
        out = torch.empty_like(q)
        sums = torch.empty(q.shape[:2], dtype=compute, device=q.device)
        for group in self._groups:
            self._attend(group, layer, q, scale, out, sums)
        if self._batch.ballot is not None:
            count_votes(self._batch, self._batch.ballot, layer, q, scale, sums)
        return out, sums

    def _attend(self, group: _Group, layer: LayerKV, q: Tensor, scale: float, out: Tensor, sums: Tensor) -> None:
        compute = torch.float64 if q.dtype == torch.float64 else torch.float32
        kv_heads = layer.k.shape[1]
        pieces, n = group.queries.shape
        heads, head_dim = q.shape[1:]
        pages = self._batch.pages_of(layer).index_select(0, group.rows)[..., : -(-group.length // self._page_size)]
        pages = pages if pages.dim() == 3 else pages[:, None]
        k, v = (part.to(compute) for part in layer.gather(pages, group.length))  # [pieces, kv_heads, length, head_dim]
        grouped = q[group.queries].to(compute).view(pieces, n, kv_heads, heads // kv_heads, head_dim)
        grouped = (grouped * scale).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [pieces, kv_heads, group * n, head_dim]
        scores = torch.matmul(grouped, k.transpose(2, 3)).view(pieces, kv_heads, -1, n, group.length)
        scores[..., group.unmasked :].masked_fill_(group.hidden, float("-inf"))
        total = torch.logsumexp(scores, -1)  # [pieces, kv_heads, group, n]
        if layer.sinks is not None:
            total = torch.logaddexp(total, layer.sinks.to(compute).view(kv_heads, -1, 1))
        sums[group.queries] = total.permute(0, 3, 1, 2).flatten(2, 3)
        # A weight of zero does not cancel a NaN, and slots that no query of a piece sees may hold anything.
        v[:, :, group.unmasked :].masked_fill_(group.hidden[:, 0].all(2)[..., None], 0.0)
        weights = torch.exp(scores - total[..., None]).flatten(2, 3)
        mixed = torch.matmul(weights, v).view(pieces, kv_heads, -1, n, head_dim)
        out[group.queries] = mixed.permute(0, 3, 1, 2, 4).flatten(2, 3).to(out.dtype)


def _pad(pieces: list[_Piece], window: int, device: torch.device) -> _Group:
    """Make a group of pieces, the longest last. window: see AttentionBatch."""
    n, length = pieces[0].n, pieces[-1].length
    unmasked = 0 if window else min(piece.length for piece in pieces) - n + 1
    steps = torch.arange(n)
    visible = torch.tensor([piece.length for piece in pieces])[:, None] - n + 1 + steps  # [pieces, n]
    slots = torch.arange(unmasked, length)
    hidden = slots >= visible[..., None]
    if window:
        hidden |= slots < visible[..., None] - window
    return _Group(
        rows=send(torch.tensor([piece.row for piece in pieces]), device),
        queries=send(torch.tensor([piece.first for piece in pieces])[:, None] + steps, device),
        length=length,
        unmasked=unmasked,
        hidden=send(hidden[:, None, None], device),
    )


def _similar(pieces: list[_Piece]) -> list[list[_Piece]]:
    """Split pieces, sorted by (n, length), where padding would more than double the work or the copy grow too large."""
    groups: list[list[_Piece]] = []
    for piece in pieces:
        group = groups[-1] if groups else None
        if (
            group
            and group[0].n == piece.n
            and piece.length <= 2 * group[0].length
            and piece.length * (len(group) + 1) <= _GROUP_SLOTS
        ):
            group.append(piece)
        else:
            groups.append([piece])
    return groups


def count_votes(batch: AttentionBatch, ballot: Ballot, layer: LayerKV, q: Tensor, scale: float, lse: Tensor) -> None:
    """Count the votes of a run, row by row; see Ballot.

    q: [tokens, heads, head_dim]. lse: [tokens, heads], the run's.
    """
    kv_heads, page_size, head_dim = layer.k.shape[1:]
    lists, ends = batch.pages_of(layer), np.cumsum(batch.query_lengths)
    rows = zip(batch.kv_lengths, ends.tolist(), ballot.voters.tolist(), strict=True)
    for row, (length, end, voters) in enumerate(rows):
        pages = lists[row : row + 1, ..., : -(-length // page_size)]
        k = layer.gather(pages if pages.dim() == 3 else pages[:, None], length)[0][0].to(lse.dtype)
        votes = torch.zeros(kv_heads, -(-length // ballot.unit) * ballot.unit, dtype=lse.dtype, device=q.device)
        for behind in (each for each in voters if each >= 0):
            token, sees = end - 1 - behind, length - behind
            query = q[token].to(lse.dtype).view(kv_heads, -1, head_dim) * scale
            scores = query @ k[:, :sees].transpose(1, 2) - lse[token].view(kv_heads, -1, 1)
            votes[:, :sees] += scores.exp().sum(1)
        sums = votes.view(kv_heads, -1, ballot.unit).sum(2)
        ballot.votes[row, :, : sums.shape[1]] = sums.float()


def merge_segments(outputs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Combine attention over disjoint segments of KV: o = sum_i exp(lse_i - lse) o_i.

    outputs: each [tokens, heads, head_dim]. lses: each [tokens, heads], -inf where a segment is empty.
    Returns the attention over all segments and its log-sum-exp.
    """
    stacked = torch.stack(lses)
    total = torch.logsumexp(stacked, 0)
    weights = torch.exp(stacked - total)
    merged = sum(w[..., None] * o.to(w.dtype) for w, o in zip(weights, outputs, strict=True))
    assert isinstance(merged, Tensor)
    return merged.to(outputs[0].dtype), total
