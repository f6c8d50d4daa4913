"""Votes beside FlashInfer's attention, whose kernels count none: a pass in Triton over the keys of the voting rows."""

from __future__ import annotations

from torch import Tensor

from kernels.attention.base import AttentionBatch, Ballot, GraphBatch
from kernels.kv.kv_pool import LayerKV


class FlashInferVotes:
    """Votes of one batch, counted after each run, from its log-sum-exp.

    Keys of the rows that vote are read once more, each row's by itself: half of the bytes of their KV. Rows that do not
    vote cost nothing, and no memory is needed.
    """

    def __init__(
        self, batch: AttentionBatch | GraphBatch, ballot: Ballot, start: Tensor, queries: Tensor, lengths: Tensor
    ) -> None:
        """ballot: the batch's. start, queries, lengths: see VotingRows."""
        from kernels.gpu.votes import VotingRows, count_votes  # not every platform of tests has Triton

        self._batch, self._ballot, self._count = batch, ballot, count_votes
        self._rows = VotingRows(start, queries, lengths)

    def count(self, layer: LayerKV, q: Tensor, scale: float, lse: Tensor) -> None:
        """Count the votes of a run. lse: [tokens, heads], the natural one."""
        self._count(self._ballot, self._rows, self._batch.pages_of(layer), layer, q, scale, lse)
