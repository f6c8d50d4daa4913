"""Votes of queries for the KV that their row lists, against softmax weights written out."""

from __future__ import annotations

import torch
from hypothesis import given

from kernels.attention.base import AttentionBatch
from kernels.attention.reference_attention import ReferenceAttention
from tests.support.ballots import VoteCase, check_votes, draw_batch, vote_cases
from tests.support.profiles import examples


@given(case=vote_cases(max_queries=6, max_before=40, head_dims=(4,), page_sizes=(1, 2, 3, 8)))
@examples(40, 150)
def test_reference_counts_votes(case: VoteCase) -> None:
    check_votes(ReferenceAttention(case.page_size), draw_batch(case, torch.float64), 1e-5)


@given(case=vote_cases(max_queries=6, max_before=40, head_dims=(4,), page_sizes=(1, 2, 3, 8)))
@examples(20, 60)
def test_lists_per_layer(case: VoteCase) -> None:
    """Each layer gives the results of its own lists."""
    batch = draw_batch(case, torch.float64)
    backend = ReferenceAttention(case.page_size)
    for layer in batch.layers:
        out, lse, _ = batch.attend(backend, layer, votes=False)
        lists = batch.pages[layer.index] if case.per_layer else batch.pages
        backend.plan(AttentionBatch(case.queries, case.lengths, lists))
        own, own_lse = backend.run(layer, batch.q, batch.scale)
        assert torch.equal(out, own)
        assert torch.equal(lse, own_lse)
