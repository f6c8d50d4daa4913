"""CPU attention of queries that see a window: results are those of plain torch, whatever pages before the window hold,
and the same to the bit whatever else is in the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from torch import Tensor

from kernels.attention.base import AttentionBackend, AttentionBatch, Ballot
from kernels.attention.cpu_attention import CpuAttention
from kernels.attention.reference_attention import ReferenceAttention
from kernels.attention.relative import RelativeAttention
from kernels.cpu.library import SEGMENT, CpuKernels
from kernels.kv.kv_bits import SEALED_GROUP
from kernels.kv.kv_pool import LayerKV
from tests.support.kv_layers import draw_sinks, layer_of
from tests.support.profiles import each_value, examples

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
POOL = 97
GONE = POOL
"""A page of NaN, which lists name in place of pages that no query sees."""


def make_layer(kind: str, kv_heads: int, page_size: int, head_dim: int, dtype: torch.dtype) -> LayerKV:
    """Return a layer of random numbers and the page GONE. kind: see layer_of; half of the pages are sealed."""
    k, v = torch.randn(2, POOL + 1, kv_heads, page_size, head_dim).to(dtype)
    k[GONE] = v[GONE] = float("nan")
    return layer_of(kind, k, v, 0 if kind == "dense" else POOL // 2)


def make_batch(
    lists: Tensor, queries: Sequence[int], lengths: Sequence[int], page_size: int, window: int
) -> AttentionBatch:
    """Return a batch of these lists, [rows, width], in which pages that no query sees are GONE."""
    lists = lists.clone()
    for pages, n, length in zip(lists, queries, lengths, strict=True):
        pages[: max(length - n + 1 - window, 0) // page_size] = GONE
    return AttentionBatch(queries, lengths, lists, window=window)


def run(
    backend: AttentionBackend, layer: LayerKV, batch: AttentionBatch, q: Tensor, threads: int = 2
) -> tuple[Tensor, Tensor]:
    before = torch.get_num_threads()
    backend.plan(batch)
    torch.set_num_threads(threads)
    try:
        return backend.run(layer, q, q.shape[2] ** -0.5)
    finally:
        torch.set_num_threads(before)


def check(
    kernels: CpuKernels,
    layer: LayerKV,
    rows: Sequence[tuple[int, int]],
    window: int,
    group: int,
    parts: Sequence[int] = (1, 5, 33),
) -> None:
    """Compare rows of queries, and slots before them, with plain torch, and with parts of their queries alone. Groups
    of an odd number of heads have sinks."""
    dtype, (_, kv_heads, page_size, head_dim) = layer.k.dtype, layer.k.shape
    queries, lengths = [n for n, _ in rows], [n + before for n, before in rows]
    lists = torch.randint(POOL, (len(rows), -(-max(lengths) // page_size)))
    q = torch.randn(sum(queries), kv_heads * group, head_dim).to(dtype)
    if group % 2:
        layer = draw_sinks(layer, kv_heads * group)
    batch = make_batch(lists, queries, lengths, page_size, window)
    expected, expected_lse = run(ReferenceAttention(page_size), layer, batch, q)
    o, lse = run(CpuAttention(kernels), layer, batch, q)
    tolerance = TOLERANCE[dtype] if layer.sealed is None else max(TOLERANCE[dtype], 1e-4)
    torch.testing.assert_close(o.float(), expected.float(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-3, atol=max(1e-5, tolerance / 2))
    start = 0
    for row, (n, length) in enumerate(zip(queries, lengths, strict=True)):
        for part in (each for each in parts if each <= n):
            for first in {0, n // 2, n - part}:
                last = min(first + part, n)
                alone = make_batch(lists[row : row + 1], [last - first], [length - n + last], page_size, window)
                these = slice(start + first, start + last)
                found, found_lse = run(CpuAttention(kernels), layer, alone, q[these], threads=1)
                assert torch.equal(found, o[these])
                assert torch.equal(found_lse, lse[these])
        start += n


@pytest.mark.parametrize(
    ("window", "head_dim", "dtype"), each_value([1, 15, 16, 17, 512, 9000], [64, 256, 128], [*TOLERANCE]), ids=str
)
def test_windows(kernels: CpuKernels, window: int, head_dim: int, dtype: torch.dtype) -> None:
    """Decode rows, a verify pass, and chunks of a prefill."""
    torch.manual_seed(window)
    layer = make_layer("dense", 2, 16, head_dim, dtype)
    check(kernels, layer, [(1, 0), (1, 700), (5, 2 * SEGMENT + 300), (40, 600), (70, SEGMENT)], window, 3)


@given(
    rows=st.lists(
        st.tuples(
            st.sampled_from([1, 2, 4, 7, 30, 70, 130]),
            st.sampled_from([0, 1, 15, 63, 64, 65, 500, SEGMENT - 1, SEGMENT, SEGMENT + 511, 2 * SEGMENT + 70]),
        ),
        min_size=1,
        max_size=4,
    ),
    page_size=st.sampled_from([1, 7, 16, 32, 48, 64, 100, 256]),
    beside=st.sampled_from([-1, 0, 1]),
    window=st.sampled_from([0, 1, 16, 64, 512, SEGMENT]),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 5),
    head_dim=st.sampled_from([16, 48, 64, 80, 128, 256]),
    dtype=st.sampled_from(list(TOLERANCE)),
    seed=st.integers(0, 1000),
)
@examples(12, 150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_window(
    kernels: CpuKernels,
    rows: list[tuple[int, int]],
    page_size: int,
    beside: int,
    window: int,
    kv_heads: int,
    group: int,
    head_dim: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """window: 0: about a page."""
    torch.manual_seed(seed)
    layer = make_layer("dense", kv_heads, page_size, head_dim, dtype)
    check(kernels, layer, rows, max(1, (window or page_size) + beside), group)


@pytest.mark.parametrize(("window", "dtype"), each_value([1, 100, 512, 1500], [*TOLERANCE]), ids=str)
def test_chunks_of_any_size(kernels: CpuKernels, window: int, dtype: torch.dtype) -> None:
    """A prompt has the same results to the bit however it is cut, beside another row or not."""
    torch.manual_seed(window)
    n, page_size = 2400, 16
    layer = make_layer("dense", 1, page_size, 64, dtype)
    lists, q = torch.randint(POOL, (1, n // page_size)), torch.randn(n, 3, 64).to(dtype)
    whole = run(CpuAttention(kernels), layer, make_batch(lists, [n], [n], page_size, window), q)
    for size in (1, 20, 64, 777):
        for first in range(0 if size > 64 else 1000, n if size > 64 else 1100, size):
            last = min(first + size, n)
            batch = make_batch(lists.repeat(2, 1), [3, last - first], [n, last], page_size, window)
            found = run(CpuAttention(kernels), layer, batch, torch.cat([q[-3:], q[first:last]]))
            for mine, all_of_it in zip(found, whole, strict=True):
                assert torch.equal(mine, torch.cat([all_of_it[-3:], all_of_it[first:last]]))


@pytest.mark.parametrize(("dtype", "kind"), each_value([*TOLERANCE], ["int8", "int4x2", "upper"]), ids=str)
def test_sealed_pages(kernels: CpuKernels, dtype: torch.dtype, kind: str) -> None:
    torch.manual_seed(0)
    layer = make_layer(kind, 2, SEALED_GROUP, 64, dtype)
    layer.k.mul_(0.2)  # scores in which a key's rounding to 16 bits is little
    for window in (1, 63, 64, 65, 512, 5000):
        check(kernels, layer, [(1, 300), (1, SEGMENT + 600), (5, SEGMENT + 62), (70, 64), (70, SEGMENT)], window, 2)


def test_a_window_that_hides_nothing(kernels: CpuKernels) -> None:
    layer = make_layer("dense", 2, 16, 64, torch.bfloat16)
    batch = make_batch(torch.randint(POOL, (2, 100)), [3, 40], [1500, 900], 16, 1500)
    q = torch.randn(43, 6, 64).bfloat16()
    windowed, plain = (run(CpuAttention(kernels), layer, each, q) for each in (batch, replace(batch, window=0)))
    assert torch.equal(windowed[0], plain[0])
    assert torch.equal(windowed[1], plain[1])


def test_what_has_no_window(kernels: CpuKernels) -> None:
    layer, pages = make_layer("dense", 1, 16, 64, torch.float32), torch.zeros(1, 4, dtype=torch.int64)
    batch = AttentionBatch([1], [50], pages, window=20)
    ballot = Ballot(torch.zeros(1, 2, dtype=torch.int64), 16, torch.empty(1, 1, 4))
    lengths = torch.tensor(batch.query_lengths), torch.tensor(batch.kv_lengths)
    for window, with_ballot, message in ((20, ballot, "a window of 20 slots, and votes"), (-1, None, "a window of -1")):
        with pytest.raises(RuntimeError, match=message):
            kernels.attention(torch.randn(1, 2, 64), layer.k, layer.v, *lengths, pages, 1, with_ballot, window=window)
    angles, reference = torch.zeros(64, 32), ReferenceAttention(16)
    with pytest.raises(AssertionError, match="the distance that a window is"):
        RelativeAttention(reference, reference, page_size=16, sink_pages=1, rotary=(angles, angles)).plan(batch)
