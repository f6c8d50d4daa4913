"""Lists per layer, and votes, of attention on GPUs: Triton's in its interpreter, FlashInfer's over a fake."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from torch import Tensor

from kernels.attention.base import AttentionBackend, AttentionBatch, Ballot, GraphBatch, SharedPrefix
from kernels.attention.reference_attention import ReferenceAttention
from kernels.flashinfer.flashinfer_attention import FlashInferAttention
from kernels.flashinfer.flashinfer_graph import FlashInferGraphAttention
from kernels.flashinfer.flashinfer_workspace import Workspace
from tests.support import fake_flashinfer
from tests.support.ballots import VoteBatch, VoteCase, check_captured, check_votes, draw_batch, vote_cases
from tests.support.profiles import examples, is_all
from tests.support.rig import CPU, pool_layer
from tests.support.shared_batches import always_share

pytest.importorskip("triton", reason="Triton is not installed: there are no builds for this platform")

from kernels.attention.triton_attention import GpuAttention, GpuGraphAttention, GpuPrefixGraphAttention
from kernels.gpu import INTERPRETED
from kernels.gpu.attention import VOTE_BYTES
from kernels.gpu.votes import count_votes

if not INTERPRETED:
    pytest.skip("tests/gpu has these on a GPU", allow_module_level=True)

from tests.support.recorded import Recorded

SPAN = 64
BEFORE = 100 if is_all() else 70
"""Largest number of slots before queries: more than a span."""
ROWS = 4 if is_all() else 2
TRITON = vote_cases(max_queries=5, max_before=BEFORE, max_rows=ROWS, head_dims=(16, 20), page_sizes=(1, 7, 16))
"""Lists of one and of several spans."""
VOTES = vote_cases(max_queries=5, max_before=BEFORE, max_rows=ROWS, head_dims=(16, 20), page_sizes=(7, 16, 24, 80))
"""Also pages that are cut by tiles of keys."""
FLASHINFER = vote_cases(max_queries=5, max_before=60, head_dims=(64,), page_sizes=(1, 7, 16))
TOLERANCE = {torch.float32: 2e-4, torch.float16: 3e-3}


def workspace() -> Workspace:
    return Workspace(CPU, (9, 0), multiprocessors=132)


def check_lists(ours: AttentionBackend, batch: VoteBatch) -> None:
    """Compare both layers of one plan with the reference."""
    oracle = ReferenceAttention(batch.case.page_size)
    tolerance = TOLERANCE[batch.q.dtype]
    first, second = batch.layers
    found = [batch.attend(ours, first, votes=False)[:2], ours.run(second, batch.q, batch.scale)]
    for layer, mine in zip(batch.layers, found, strict=True):
        for each, expected in zip(mine, batch.attend(oracle, layer, votes=False)[:2], strict=True):
            torch.testing.assert_close(each, expected, rtol=tolerance, atol=tolerance)


def rerun(work: Callable[[], None]) -> Callable[[], None]:
    """Stand in for a capture: the fake runs in Python, which cannot be recorded."""
    work()
    return work


@given(case=TRITON)
@examples(2, 40)
def test_lists_per_layer_in_triton(case: VoteCase) -> None:
    batch = draw_batch(case, torch.float32)
    check_lists(GpuAttention(SPAN), batch)
    check_captured(lambda rows: GpuGraphAttention(rows, SPAN), Recorded().capture, batch, votes=False, tolerance=2e-4)


@given(case=VOTES, dtype=st.sampled_from([torch.float32, torch.bfloat16]), room=st.booleans())
@examples(3, 80, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_votes_in_triton(monkeypatch: pytest.MonkeyPatch, case: VoteCase, dtype: torch.dtype, room: bool) -> None:
    """room: whether sums of whole pages are kept while keys are read; else these are read once more."""
    monkeypatch.setattr("kernels.gpu.attention.VOTE_BYTES", VOTE_BYTES if room else 0)
    check_votes(GpuAttention(SPAN), draw_batch(case, dtype), 2e-4)


@given(case=VOTES, room=st.booleans())
@examples(2, 40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_captured_votes_in_triton(monkeypatch: pytest.MonkeyPatch, case: VoteCase, room: bool) -> None:
    monkeypatch.setattr("kernels.gpu.attention.VOTE_BYTES", VOTE_BYTES if room else 0)
    batch = draw_batch(case, torch.float32)
    check_captured(lambda rows: GpuGraphAttention(rows, SPAN), Recorded().capture, batch, votes=True, tolerance=2e-4)


@pytest.mark.parametrize(("head_dim", "queries", "unit"), [(256, 20, 16), (16, 80, 16), (16, 1, 8), (16, 1, 4)])
def test_keys_are_read_again_only_where_they_must(
    monkeypatch: pytest.MonkeyPatch, head_dim: int, queries: int, unit: int
) -> None:
    """For small units, and for chunks with large heads. In a chunk of several tiles, one holds the voters."""
    again: list[Ballot] = []

    def note(ballot: Ballot, *arguments: Any) -> None:
        again.append(ballot)
        count_votes(ballot, *arguments)

    monkeypatch.setattr("kernels.gpu.attention.count_votes", note)
    torch.manual_seed(0)
    layer = pool_layer(9, 1, 16, head_dim, torch.bfloat16)
    lengths, lists, q = [queries + 30], torch.randint(9, (1, 7)), torch.randn(queries, 4, head_dim).bfloat16()
    found = []
    for backend in (GpuAttention(), ReferenceAttention(16)):
        ballot = Ballot(torch.tensor([[0, queries // 2]]), unit, torch.zeros(1, 1, 7 * 16 // unit))
        backend.plan(AttentionBatch([queries], lengths, lists, ballot=ballot))
        backend.run(layer, q, head_dim**-0.5)
        found.append(ballot.votes)
    torch.testing.assert_close(*found, rtol=2e-4, atol=1e-6)
    assert len(again) == (head_dim == 256 or unit < 8)


@pytest.mark.parametrize("room", [True, False])
def test_voters_between_other_numbers_are_refused(monkeypatch: pytest.MonkeyPatch, room: bool) -> None:
    """Kernels would take these for voters of later rows."""
    monkeypatch.setattr("kernels.gpu.attention.VOTE_BYTES", VOTE_BYTES if room else 0)
    layer, q, backend = pool_layer(9, 1, 16, 16, torch.float32), torch.randn(4, 1, 16), GpuAttention()
    ballot = Ballot(torch.zeros(2, 4, dtype=torch.int64)[:, :2], 16, torch.zeros(2, 1, 3))
    backend.plan(AttentionBatch([2, 2], [40, 30], torch.randint(9, (2, 3)), ballot=ballot))
    with pytest.raises(ValueError, match="voters are not contiguous"):
        backend.run(layer, q, 0.25)


@pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])
@pytest.mark.parametrize("library", ["triton", "flashinfer"])
def test_rows_that_share_pages_vote(monkeypatch: pytest.MonkeyPatch, library: str, captured: bool) -> None:
    """For the shared pages too, which are still read once: results are those without votes."""
    always_share(monkeypatch)
    monkeypatch.setitem(sys.modules, "flashinfer", fake_flashinfer)
    torch.manual_seed(0)
    layer, q = pool_layer(31, 2, 16, 64, torch.float16), torch.randn(12, 4, 64).half()
    lists, lengths, prefixes = torch.randint(31, (3, 6)), [70, 30, 90], [SharedPrefix((0, 2), 3)]
    lists[2, :3] = lists[0, :3]
    voters = torch.tensor([[0, 3], [1, -1], [2, 2]])

    def results(ballot: Ballot | None) -> tuple[Tensor, Tensor]:
        if captured:
            rows = GraphBatch(4, lists, torch.tensor(lengths), prefixes=1, ballot=ballot)
            triton = library == "triton"
            graph = GpuPrefixGraphAttention(rows) if triton else FlashInferGraphAttention(16, workspace(), rows)
            graph.plan(lengths, prefixes)
            return graph.run(layer, q, 0.1)
        ours = GpuAttention() if library == "triton" else FlashInferAttention(16, workspace())
        ours.plan(AttentionBatch([4] * 3, lengths, lists, prefixes=prefixes, ballot=ballot))
        return ours.run(layer, q, 0.1)

    ballot, expected = (Ballot(voters, 16, torch.zeros(3, 2, 6)) for _ in range(2))
    oracle = ReferenceAttention(16)
    oracle.plan(AttentionBatch([4] * 3, lengths, lists, ballot=expected))
    oracle.run(layer, q, 0.1)
    for with_votes, without in zip(results(ballot), results(None), strict=True):
        assert torch.equal(with_votes, without)
    torch.testing.assert_close(ballot.votes, expected.votes, rtol=3e-3, atol=1e-5)


@given(case=FLASHINFER)
@pytest.mark.parametrize("uniform", [True, False], ids=["0.7", "0.6"])
@examples(6, 40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_lists_per_layer_in_flashinfer(monkeypatch: pytest.MonkeyPatch, uniform: bool, case: VoteCase) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", fake_flashinfer)
    monkeypatch.setattr("kernels.flashinfer.flashinfer_graph.takes_uniform_queries", lambda library: uniform)
    batch = draw_batch(case, torch.float16)
    check_lists(FlashInferAttention(case.page_size, workspace()), batch)
    check_captured(
        lambda rows: FlashInferGraphAttention(case.page_size, workspace(), rows),
        rerun,
        batch,
        votes=False,
        tolerance=3e-3,
    )


@given(case=FLASHINFER)
@pytest.mark.parametrize("uniform", [True, False], ids=["0.7", "0.6"])
@examples(2, 30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_votes_in_flashinfer(monkeypatch: pytest.MonkeyPatch, uniform: bool, case: VoteCase) -> None:
    """Eager and captured."""
    monkeypatch.setitem(sys.modules, "flashinfer", fake_flashinfer)
    monkeypatch.setattr("kernels.flashinfer.flashinfer_graph.takes_uniform_queries", lambda library: uniform)
    batch = draw_batch(case, torch.float16)
    check_votes(FlashInferAttention(case.page_size, workspace()), batch, 2e-4)
    check_captured(
        lambda rows: FlashInferGraphAttention(case.page_size, workspace(), rows),
        rerun,
        batch,
        votes=True,
        tolerance=3e-3,
    )
