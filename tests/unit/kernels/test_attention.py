"""The reference backend against attention written out per query, and against torch's own attention."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels.attention.base import AttentionBatch
from kernels.attention.reference_attention import ReferenceAttention, merge_segments
from kernels.attention.shared_reading import merge_sinks
from kernels.kv.kv_pool import LayerKV, write_kv
from tests.support.kv_layers import draw_sinks
from tests.support.profiles import examples
from tests.support.rig import pool_layer


def one_query(layer: LayerKV, q: Tensor, pages: Tensor, visible: int, scale: float) -> tuple[Tensor, Tensor]:
    """Compute attention of one query, slot by slot. q: [heads, head_dim]. pages: [kv_heads, width]."""
    kv_heads, page_size = layer.k.shape[1:3]
    group = q.shape[0] // kv_heads
    outs, lses = [], []
    for head in range(q.shape[0]):
        kv_head = head // group
        slots = [(int(pages[kv_head, t // page_size]), t % page_size) for t in range(visible)]
        k = torch.stack([layer.k[page, kv_head, offset] for page, offset in slots]).double()
        v = torch.stack([layer.v[page, kv_head, offset] for page, offset in slots]).double()
        scores = k @ q[head].double() * scale
        outs.append(torch.softmax(scores, 0) @ v)
        if layer.sinks is not None:
            scores, v = torch.cat([scores, layer.sinks[head : head + 1]]), torch.cat([v, torch.zeros_like(v[:1])])
            outs[-1] = torch.softmax(scores, 0) @ v
        lses.append(torch.logsumexp(scores, 0))
    return torch.stack(outs), torch.stack(lses)


@given(
    rows=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 40)), min_size=1, max_size=5),
    page_size=st.sampled_from([1, 2, 3, 8, 16]),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    per_head=st.booleans(),
    sinks=st.booleans(),
    seed=st.integers(0, 1000),
)
@examples(40, 120)
def test_equals_written_out(
    rows: list[tuple[int, int]], page_size: int, kv_heads: int, group: int, per_head: bool, sinks: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    head_dim = 4
    queries = [n for n, _ in rows]
    lengths = [n + before for n, before in rows]
    width = -(-max(lengths) // page_size)
    layer = pool_layer(97, kv_heads, page_size, head_dim, torch.float64)
    if sinks:
        layer = draw_sinks(layer, kv_heads * group, torch.float64)
    shape = (len(rows), kv_heads, width) if per_head else (len(rows), width)
    pages = torch.randint(97, shape)
    q = torch.randn(sum(queries), kv_heads * group, head_dim, dtype=torch.float64)
    backend = ReferenceAttention(page_size)
    backend.plan(AttentionBatch(queries, lengths, pages))
    out, lse = backend.run(layer, q, 0.3)
    token = 0
    for row, (n, length) in enumerate(zip(queries, lengths, strict=True)):
        listed = pages[row] if per_head else pages[row].expand(kv_heads, width)
        for i in range(n):
            expected, expected_lse = one_query(layer, q[token], listed, length - n + i + 1, 0.3)
            torch.testing.assert_close(out[token], expected)
            torch.testing.assert_close(lse[token], expected_lse)
            token += 1


def test_long_chunk_equals_torch() -> None:
    """A chunk longer than one block of queries, after a context, against scaled_dot_product_attention."""
    torch.manual_seed(0)
    n, length, heads, kv_heads, head_dim, page_size = 300, 700, 6, 2, 16, 16
    layer = pool_layer(64, kv_heads, page_size, head_dim, torch.float32)
    pages = torch.randperm(64)[None, : -(-length // page_size)]
    q = torch.randn(n, heads, head_dim)
    backend = ReferenceAttention(page_size)
    backend.plan(AttentionBatch([n], [length], pages))
    out, _ = backend.run(layer, q, 1 / math.sqrt(head_dim))
    k, v = (cache[pages[0]].transpose(0, 1).flatten(1, 2)[None, :, :length] for cache in (layer.k, layer.v))
    mask = torch.ones(n, length, dtype=torch.bool).tril(length - n)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1)[None], k, v, attn_mask=mask, enable_gqa=True
    )
    torch.testing.assert_close(out, expected[0].transpose(0, 1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_pool_loses_only_its_own_rounding(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = pool_layer(40, 2, 16, 32, dtype)
    q = torch.randn(3, 4, 32).to(dtype)
    backend = ReferenceAttention(16)
    backend.plan(AttentionBatch([3], [600], torch.randperm(40)[None]))
    out, _ = backend.run(layer, q, 0.2)
    exact, _ = backend.run(LayerKV(layer.k.double(), layer.v.double()), q.double(), 0.2)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact, atol=2e-3, rtol=1e-2)


@given(cut=st.integers(0, 63), seed=st.integers(0, 100))
@examples(20, 40)
def test_disjoint_segments_merge_by_log_sum_exp(cut: int, seed: int) -> None:
    torch.manual_seed(seed)
    layer = pool_layer(8, 2, 8, 4, torch.float64)
    q = torch.randn(1, 4, 4, dtype=torch.float64)
    page_lists = torch.randperm(8)
    backend = ReferenceAttention(8)
    backend.plan(AttentionBatch([1], [64], page_lists[None]))
    whole, whole_lse = backend.run(layer, q, 0.5)
    cut = max(8, cut // 8 * 8)  # segments are whole pages
    parts = []
    for segment in (page_lists[: cut // 8], page_lists[cut // 8 :]):
        if len(segment):
            backend.plan(AttentionBatch([1], [len(segment) * 8], segment[None]))
            parts.append(backend.run(layer, q, 0.5))
    merged, merged_lse = merge_segments([o for o, _ in parts], [lse for _, lse in parts])
    torch.testing.assert_close(merged, whole)
    torch.testing.assert_close(merged_lse, whole_lse)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sinks_that_are_added_later(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = draw_sinks(pool_layer(8, 2, 8, 16, dtype), 6, torch.promote_types(dtype, torch.float32))
    q = torch.randn(5, 6, 16).to(dtype)
    backend = ReferenceAttention(8)
    backend.plan(AttentionBatch([5], [60], torch.randperm(8)[None]))
    assert layer.sinks is not None
    added, added_lse = backend.run(replace(layer, sinks=None), q, 0.5)
    merge_sinks(added, added_lse, layer.sinks)
    out, lse = backend.run(layer, q, 0.5)
    assert added.dtype == out.dtype == dtype
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(added, out, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(added_lse, lse)


def test_write_kv_puts_each_token_in_its_slot() -> None:
    layer = pool_layer(5, 2, 4, 3, torch.float32)
    before = layer.k.clone()
    slots = torch.tensor([19, 0, 7])
    k, v = torch.randn(3, 2, 3), torch.randn(3, 2, 3)
    write_kv(layer, slots, k, v)
    for i, slot in enumerate(slots.tolist()):
        assert torch.equal(layer.k[slot // 4, :, slot % 4], k[i])
        assert torch.equal(layer.v[slot // 4, :, slot % 4], v[i])
    assert int((layer.k != before).any(-1).any(1).sum()) == 3


def test_what_stands_past_a_row_never_reaches_it() -> None:
    """Pages are reused without clearing: NaN or inf of another request must not leak through a zero weight."""
    torch.manual_seed(0)
    layer = pool_layer(12, 2, 4, 8, torch.float32)
    q = torch.randn(4, 4, 8)
    batch = AttentionBatch([1, 3], [6, 10], torch.tensor([[0, 1, 2], [3, 4, 5]]))
    backend = ReferenceAttention(4)
    backend.plan(batch)
    clean, _ = backend.run(layer, q, 0.5)
    for cache in (layer.k, layer.v):
        cache[1, :, 2:] = float("nan")  # row 0 ends at slot 6
        cache[2] = float("inf")
        cache[5, :, 2:] = float("nan")  # row 1 ends at slot 10
    assert torch.equal(backend.run(layer, q, 0.5)[0], clean)
