"""Votes of queries for the KV that their row lists, against softmax weights written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from kernels.attention.base import AttentionBatch, Ballot
from kernels.attention.cpu_attention import CpuAttention
from kernels.attention.reference_attention import ReferenceAttention
from kernels.cpu.library import CpuKernels
from tests.support.ballots import VoteCase, check_votes, draw_batch, vote_cases
from tests.support.profiles import examples
from tests.support.rig import pool_layer


@given(case=vote_cases(max_queries=6, max_before=40, head_dims=(4,), page_sizes=(1, 2, 3, 8)))
@examples(40, 150)
def test_reference_counts_votes(case: VoteCase) -> None:
    check_votes(ReferenceAttention(case.page_size), draw_batch(case, torch.float64), 1e-5)


LONG_ROWS = vote_cases(
    max_queries=70, max_before=2300, head_dims=(16, 48, 64, 80, 128), page_sizes=(1, 7, 16, 48, 64, 100)
)
"""Rows of several segments, of which those with many queries are cut by query and KV head."""


@given(case=LONG_ROWS, dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
@examples(12, 80, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_cpu_kernels_count_votes(kernels: CpuKernels, case: VoteCase, dtype: torch.dtype) -> None:
    batch = draw_batch(case, dtype)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    check_votes(CpuAttention(kernels), batch, tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_cpu_kernels_count_votes_of_shared_segments(kernels: CpuKernels, dtype: torch.dtype) -> None:
    """Rows that share segments are computed together, and each has its own votes."""
    rows = ((4, 3000, (0, 3)), (7, 2000, (6, -1)), (1, 2047, (0, -1)), (5, 2300, (-1, -1)), (30, 1500, (2, 29)))
    for unit in (1, 16):
        case = VoteCase(rows, 16, 3, 3, 64, per_head=False, per_layer=False, unit=unit, shared=True, sinks=True, seed=3)
        check_votes(CpuAttention(kernels), draw_batch(case, dtype), 1e-2)


def test_cpu_kernels_refuse_ballots_that_do_not_fit(kernels: CpuKernels) -> None:
    layer, q, backend = pool_layer(5, 1, 16, 32, torch.float32), torch.randn(3, 1, 32), CpuAttention(kernels)
    for voters, unit, units, message in (
        ([[0, 3]], 1, 80, "voter 3 of 3 queries"),
        ([[-2, 0]], 1, 80, "voter -2 of 3 queries"),
        ([[0, 1]], 5, 80, "5 slots do not divide a page of 16"),
        ([[0, 1]], 16, 4, "70 slots, votes for 64"),
        ([[0, 1], [0, 1]], 16, 5, "attention: voters"),
    ):
        ballot = Ballot(torch.tensor(voters), unit, torch.zeros(1, 1, units))
        backend.plan(AttentionBatch([3], [70], torch.arange(5)[None], ballot=ballot))
        with pytest.raises(RuntimeError, match=message):
            backend.run(layer, q, 0.125)


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
