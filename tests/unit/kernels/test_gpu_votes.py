"""Lists per layer, and votes, of attention on GPUs: Triton's in its interpreter, FlashInfer's over a fake."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given

from kernels.attention.base import AttentionBackend
from kernels.attention.reference_attention import ReferenceAttention
from kernels.flashinfer.flashinfer_attention import FlashInferAttention
from kernels.flashinfer.flashinfer_graph import FlashInferGraphAttention
from kernels.flashinfer.flashinfer_workspace import Workspace
from tests.support import fake_flashinfer
from tests.support.ballots import VoteBatch, VoteCase, check_captured, draw_batch, vote_cases
from tests.support.profiles import examples
from tests.support.rig import CPU

pytest.importorskip("triton", reason="Triton is not installed: there are no builds for this platform")

from kernels.attention.triton_attention import GpuAttention, GpuGraphAttention
from kernels.gpu import INTERPRETED

if not INTERPRETED:
    pytest.skip("tests/gpu has these on a GPU", allow_module_level=True)

from tests.support.recorded import Recorded

SPAN = 64
TRITON = vote_cases(max_queries=5, max_before=100, head_dims=(16, 20), page_sizes=(1, 7, 16))
"""Lists of one and of several spans."""
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
@examples(4, 40)
def test_lists_per_layer_in_triton(case: VoteCase) -> None:
    batch = draw_batch(case, torch.float32)
    check_lists(GpuAttention(SPAN), batch)
    check_captured(lambda rows: GpuGraphAttention(rows, SPAN), Recorded().capture, batch, votes=False, tolerance=2e-4)


@given(case=FLASHINFER)
@pytest.mark.parametrize("uniform", [True, False], ids=["0.7", "0.6"])
@examples(10, 40, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
