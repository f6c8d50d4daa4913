"""Bounds of pages' keys, and of products of queries with them: compiled kernels against plain torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from torch import Tensor

from kernels.cpu.cpu_ops import CpuOps
from kernels.cpu.library import CpuKernels
from kernels.ops import Ops
from kernels.reference_ops import REFERENCE
from tests.support.profiles import examples
from tests.support.rig import pool_layer

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PAGES = 41
STRANGE = [float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1e-40, 6e-8]


def summaries_of(ops: Ops, k: Tensor, pages: Tensor) -> tuple[Tensor, Tensor]:
    low, high = torch.full((len(k), 2, k.shape[1], k.shape[3]), 7.0, dtype=k.dtype).unbind(1)
    ops.summarise(k, pages, low, high)
    return low, high


@given(
    dtype=st.sampled_from(DTYPES),
    kv_heads=st.integers(1, 3),
    page_size=st.integers(1, 32),
    head_dim=st.sampled_from([8, 16, 48, 64, 128, 256]),
    named=st.integers(0, 60),
    strange=st.booleans(),
    seed=st.integers(0, 1000),
)
@examples(20, 120, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_summarise(
    kernels: CpuKernels,
    dtype: torch.dtype,
    kv_heads: int,
    page_size: int,
    head_dim: int,
    named: int,
    strange: bool,
    seed: int,
) -> None:
    """To the bit, and no page but those named."""
    torch.manual_seed(seed)
    k = pool_layer(PAGES, kv_heads, page_size, head_dim, dtype).k
    if strange:
        k.view(PAGES, -1)[torch.randint(PAGES, (30,)), 0] = torch.tensor(STRANGE)[torch.randint(7, (30,))].to(dtype)
    pages = torch.randint(PAGES, (named,))
    for found, right in zip(summaries_of(CpuOps(kernels), k, pages), summaries_of(REFERENCE, k, pages), strict=True):
        assert torch.equal(found.isnan(), right.isnan())
        assert torch.equal(found.nan_to_num(), right.nan_to_num())


@given(
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 6),
    width=st.sampled_from([1, 2, 15, 16, 17, 60, 300]),
    first=st.integers(0, 3),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    head_dim=st.sampled_from([8, 16, 48, 64, 128, 256]),
    strange=st.booleans(),
    seed=st.integers(0, 1000),
)
@examples(20, 120, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_bounds(
    kernels: CpuKernels,
    dtype: torch.dtype,
    rows: int,
    width: int,
    first: int,
    kv_heads: int,
    group: int,
    head_dim: int,
    strange: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    ops, heads = CpuOps(kernels), kv_heads * group
    low, high = summaries_of(ops, pool_layer(PAGES, kv_heads, 4, head_dim, dtype).k, torch.arange(PAGES))
    q = torch.randn(rows, heads + 2, head_dim).to(dtype)[:, :heads]
    if strange:
        for x in (low, high):
            x[torch.randint(PAGES, (5,)), 0, 1] = torch.tensor(STRANGE)[torch.randint(5, (5,))].to(dtype)
        q[0, 0, :3] = torch.tensor(STRANGE)[torch.randint(5, (3,))].to(dtype)
    pages, ends = torch.randint(PAGES, (rows, width + 3))[:, :width], torch.randint(width + 3, (rows,))
    scores = ops.bounds(q, pages, low, high, first, ends)
    torch.testing.assert_close(
        scores, REFERENCE.bounds(q, pages, low, high, first, ends), rtol=1e-4, atol=1e-5 * head_dim * group
    )
    for row in range(rows):
        place = torch.arange(width)
        assert torch.equal(scores[row, 0].isneginf(), (place < first) | (place >= ends[row]))
    # Nothing else changes a bit of a score: neither rows and pages beside it, nor threads.
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(2, threads))
        assert torch.equal(ops.bounds(q, pages, low, high, first, ends), scores)
    finally:
        torch.set_num_threads(threads)
    for row in range(rows):
        one = slice(row, row + 1)
        alone = ops.bounds(q[one], pages[one, 1:], low, high, max(0, first - 1), ends[one] - 1)
        assert torch.equal(alone[0], scores[row, :, 1:])


def test_bounds_of_nothing(kernels: CpuKernels) -> None:
    low = torch.zeros(PAGES, 2, 16)
    none = CpuOps(kernels).bounds(
        torch.zeros(0, 4, 16), torch.zeros(0, 5, dtype=torch.int64), low, low, 1, torch.zeros(0, dtype=torch.int64)
    )
    assert none.shape == (0, 2, 5)


def test_what_does_not_fit_is_refused(kernels: CpuKernels) -> None:
    ops, k, low = CpuOps(kernels), torch.zeros(PAGES, 2, 4, 16), torch.zeros(PAGES, 2, 16)
    with pytest.raises(RuntimeError, match=f"pages: {PAGES} is not below {PAGES}"):
        ops.summarise(k, torch.tensor([0, PAGES]), low, low)
    with pytest.raises(RuntimeError, match="types"):
        ops.summarise(k, torch.tensor([0]), low.half(), low.half())
    q, pages, ends = torch.zeros(1, 4, 16), torch.tensor([[0, PAGES]]), torch.tensor([2])
    with pytest.raises(RuntimeError, match=f"pages: {PAGES} is not below {PAGES}"):
        ops.bounds(q, pages, low, low, 0, ends)
    assert ops.bounds(q, pages, low, low, 0, ends - 1)[0, :, 0].eq(0).all()  # that page is not read
    with pytest.raises(RuntimeError, match="heads"):
        ops.bounds(torch.zeros(1, 3, 16), pages, low, low, 0, ends)
    with pytest.raises(RuntimeError, match="heads"):
        ops.bounds(q, pages, low[:, :0], low[:, :0], 0, ends)
