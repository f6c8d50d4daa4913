"""Attention to a window in Triton, against the reference; test_gpu_kernels.py describes where these run."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels.attention.base import AttentionBatch
from kernels.attention.reference_attention import ReferenceAttention
from kernels.kv.kv_pool import LayerKV
from tests.support.kv_layers import draw_sinks
from tests.support.profiles import examples
from tests.support.rig import pool_layer

pytest.importorskip("triton", reason="Triton is not installed: there are no builds for this platform")

from kernels.attention.triton_attention import GpuAttention

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") else "cuda")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.7e-2, torch.float16: 2e-3}


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(DEVICE, dtype)


def pool(pages: int, kv_heads: int, page_size: int, head_dim: int, dtype: torch.dtype) -> LayerKV:
    layer = pool_layer(pages, kv_heads, page_size, head_dim, dtype)
    return LayerKV(layer.k.to(DEVICE), layer.v.to(DEVICE))


@given(
    rows=st.lists(
        st.tuples(st.sampled_from([1, 1, 2, 5, 20]), st.sampled_from([0, 1, 63, 64, 130, 400])), min_size=1, max_size=3
    ),
    window=st.sampled_from([1, 2, 15, 64, 100, 1000]),
    page_size=st.sampled_from([1, 7, 16]),
    group=st.sampled_from([1, 3, 8, 20]),
    span=st.sampled_from([64, 4096]),
    dtype=st.sampled_from([*TOLERANCE]),
    seed=st.integers(0, 1000),
)
@examples(5, 60)
def test_attention_to_a_window(
    rows: list[tuple[int, int]], window: int, page_size: int, group: int, span: int, dtype: torch.dtype, seed: int
) -> None:
    """Slots that no query sees hold NaN, and so does the page that is listed in place of pages of these."""
    torch.manual_seed(seed)
    queries = [n for n, _ in rows]
    lengths = [n + before for n, before in rows]
    width = -(-max(lengths) // page_size)
    stale = len(rows) * width
    layer = pool(stale + 1, 2, page_size, 16, dtype)
    if group > 1:
        layer = draw_sinks(layer, 2 * group)
    pages = torch.randperm(stale).view(len(rows), width)
    batch = AttentionBatch(queries, lengths, pages.to(DEVICE), window=window)
    q = randn(sum(queries), 2 * group, 16, dtype=dtype)
    oracle = ReferenceAttention(page_size)
    oracle.plan(batch)
    expected, expected_lse = oracle.run(layer, q, 0.25)
    for row, (n, length) in enumerate(zip(queries, lengths, strict=True)):
        unseen = max(0, length - n + 1 - window)
        for part in (layer.k, layer.v):
            part[[stale, *pages[row, : unseen // page_size].tolist()]] = float("nan")
            part[pages[row, unseen // page_size], :, : unseen % page_size] = float("nan")
        pages[row, : unseen // page_size] = stale
    backend = GpuAttention(span)
    backend.plan(dataclasses.replace(batch, pages=pages.to(DEVICE)))
    o, lse = backend.run(layer, q, 0.25)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(o.float(), expected.float(), rtol=tolerance, atol=tolerance / 2)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-4, atol=1e-4)


def test_a_window_bounds_the_programs_of_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long list is split where all of it is read, and not for a window."""
    merged: list[int] = []
    monkeypatch.setattr("kernels.gpu.attention.merge_spans", lambda *arguments: merged.append(arguments[4]))
    layer = pool(9, 1, 16, 16, torch.float32)
    pages = torch.randint(9, (1, 40)).to(DEVICE)
    for window, spans in ((0, 10), (200, 3), (64, 0)):
        backend = GpuAttention(64)
        backend.plan(AttentionBatch([1], [640], pages, window=window))
        backend.run(layer, randn(1, 2, 16), 0.25)
        assert sum(merged) == spans
        merged.clear()
