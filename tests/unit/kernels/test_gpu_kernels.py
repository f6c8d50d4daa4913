"""The Triton kernels against plain torch: on a GPU if there is one, otherwise in Triton's interpreter.

The interpreter truncates to bfloat16 where a GPU rounds, so tolerances allow one whole last bit.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engine.speculation.verify import accept_drafts, commit_tokens
from kernels.attention.base import AttentionBatch
from kernels.attention.reference_attention import ReferenceAttention
from kernels.key_scores import snapkv_scores
from kernels.kv.kv_pool import LayerKV, write_kv
from kernels.noise import noise_bits
from kernels.ops import Gate
from kernels.reference_ops import REFERENCE
from kernels.rope import apply_rope, rotary_frequencies, rotary_tables
from kernels.weights.matrix import DenseMatrix
from tests.support.gates import GATES, joined
from tests.support.kv_layers import draw_sinks
from tests.support.profiles import each_value, examples, only_in_all
from tests.support.rig import pool_layer
from tests.support.verdicts import DecidedRound, rounds

pytest.importorskip("triton", reason="Triton is not installed: there are no builds for this platform")

from kernels.attention.triton_attention import GpuAttention
from kernels.gpu import pointwise, sample
from kernels.gpu import snapkv_scores as triton_snapkv
from kernels.gpu import verdict as triton_verdict
from kernels.gpu.attention import attend
from kernels.gpu.gpu_ops import GpuOps
from kernels.gpu.query_tiles import assign_tiles

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") else "cuda")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.7e-2, torch.float16: 2e-3}


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(DEVICE, dtype)


def pool(pages: int, kv_heads: int, page_size: int, head_dim: int, dtype: torch.dtype) -> LayerKV:
    layer = pool_layer(pages, kv_heads, page_size, head_dim, dtype)
    return LayerKV(layer.k.to(DEVICE), layer.v.to(DEVICE))


def close(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> None:
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=tolerance, atol=tolerance / 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [64, 37])
@pytest.mark.parametrize("add", [True, False])
def test_norm(dtype: torch.dtype, size: int, add: bool) -> None:
    torch.manual_seed(0)
    wide = randn(3, size + 5, dtype=dtype)
    x, delta, weight = wide[:, :size], randn(3, size, dtype=dtype), randn(size, dtype=dtype)  # rows are not contiguous
    before, behind = x.clone(), wide[:, size:].clone()
    out = pointwise.norm(x, delta if add else None, weight, 1e-5)
    close(x, before + delta if add else before, dtype)
    close(out, F.rms_norm(x.float(), (size,), weight.float(), 1e-5), dtype)
    assert torch.equal(wide[:, size:], behind)
    assert pointwise.norm(x[:0], None, weight, 1e-5).shape == (0, size)


@pytest.mark.parametrize(("function", "size", "dtype"), each_value(GATES, [1100, 16], DTYPES), ids=str)
def test_apply_gate(dtype: torch.dtype, size: int, function: Gate) -> None:
    torch.manual_seed(0)
    pairs = randn(2, 2 * size, dtype=dtype)
    sizes = torch.tensor([-300.0, 300.0, -3e4, 3e4], dtype=dtype)
    pairs[0, :4] = pairs[0, size + 4 : size + 8] = sizes
    gate, value = pairs.float().chunk(2, 1)
    out = pointwise.apply_gate(pairs, function)
    assert out.dtype == dtype
    close(out, joined(function, gate, value), dtype)
    ops = GpuOps()
    weight = DenseMatrix(torch.eye(2 * size, dtype=dtype, device=DEVICE))
    assert torch.equal(ops.linear(weight, None, gated=function)(pairs), out)


@pytest.mark.parametrize(("dtype", "norms"), each_value(DTYPES, [True, False]), ids=str)
def test_rotary(dtype: torch.dtype, norms: bool) -> None:
    torch.manual_seed(0)
    tokens, heads, kv_heads, head_dim, page_size = 3, 4, 2, 12, 5
    layer = pool(4, kv_heads, page_size, head_dim, dtype)
    expected = LayerKV(layer.k.clone(), layer.v.clone())
    tables = rotary_tables(rotary_frequencies(head_dim, 1e4), 100, dtype=torch.float32, device=DEVICE)
    qkv = randn(tokens, heads + 2 * kv_heads, head_dim, dtype=dtype)
    positions, slots = (part.to(DEVICE) for part in (torch.randint(100, (tokens,)), torch.randperm(20)[:tokens]))
    weights = randn(head_dim, dtype=dtype), randn(head_dim, dtype=dtype)
    q, k, v = qkv.clone().split_with_sizes([heads, kv_heads, kv_heads], 1)
    if norms:
        q, k = (F.rms_norm(part, (head_dim,), weight, 1e-5) for part, weight in zip((q, k), weights, strict=True))
    cos, sin = (table[positions] for table in tables)
    q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
    write_kv(expected, slots, k, v)
    pointwise.rotary(qkv, *tables, positions, slots, layer, (*weights, 1e-5) if norms else None)
    # Both sides round after the norm and again after the rotation.
    for ours, theirs in ((qkv[:, :heads], q), (layer.k, expected.k)):
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=2 * TOLERANCE[dtype], atol=2 * TOLERANCE[dtype])
    assert torch.equal(layer.v, expected.v)


INT64 = st.integers(-(2**63), 2**63 - 1)


@given(
    rows=st.lists(st.tuples(INT64, st.integers(0, 2**31)), min_size=1, max_size=4),
    start=st.integers(0, 2**20),
    size=st.integers(1, 5000),
)
@examples(10, 40)
def test_noise_has_the_integers_of_its_definition(rows: list[tuple[int, int]], start: int, size: int) -> None:
    seeds, positions = torch.tensor(rows, device=DEVICE).unbind(1)
    seeds, positions = seeds.contiguous(), positions.contiguous()
    ours = sample.noise_bits(seeds, positions, start, start + size)
    assert torch.equal(ours, noise_bits(seeds, positions, start, start + size))


@pytest.mark.parametrize("size", [only_in_all(700), 5003])
def test_sample(size: int) -> None:
    torch.manual_seed(0)
    rows, first = 8, 900
    logits = randn(rows, size) * 3
    seeds, positions = torch.randint(-(2**62), 2**62, (rows,)), torch.randint(0, 8000, (rows,))
    temperature = torch.tensor([0.0, 0.3, 1.0, 2.0], dtype=torch.float64).repeat(2)
    seeds, positions, temperature = (part.to(DEVICE) for part in (seeds, positions, temperature))
    expected, expected_tokens = REFERENCE.sample(logits.clone(), temperature, seeds, positions, first)
    values, tokens = sample.sample(logits, temperature, seeds, positions, first)
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(tokens, expected_tokens)
    # Slices of the vocabulary, of any size, give the same value and token, to the bit.
    slices = [(0, 1), (1, 450), (450, size)]
    parts = [sample.sample(logits[:, a:b], temperature, seeds, positions, first + a) for a, b in slices]
    every = torch.stack([value for value, _ in parts])
    chosen = torch.stack([token for _, token in parts]).masked_fill(every < every.amax(0), 2**40).amin(0)
    assert torch.equal(every.amax(0), values)
    assert torch.equal(chosen, tokens)


def test_sample_takes_the_lowest_of_equals() -> None:
    logits = torch.zeros(3, 9000, device=DEVICE)
    logits[1, [8999, 4097, 5000]] = 1.0
    logits[2, [5, 8600]] = 2.0
    zeros = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    _, tokens = sample.sample(logits, torch.zeros(3, device=DEVICE), zeros, zeros, 10)
    assert tokens.tolist() == [10, 4107, 15]


@pytest.mark.parametrize("size", [50, 5000])
def test_sample_of_what_is_impossible_or_not_a_number(size: int) -> None:
    """A rank whose whole slice is forbidden still returns a token, with value -inf, so that another rank's token wins.
    One NaN makes the row's value NaN, with some token of the slice."""
    zeros = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    temperature = torch.tensor([0.0, 1.0], device=DEVICE)
    logits = torch.full((2, size), float("-inf"), device=DEVICE)
    values, tokens = sample.sample(logits, temperature, zeros, zeros, 10)
    assert values.tolist() == [float("-inf")] * 2
    assert tokens.tolist() == [10, 10]
    for place in (3, size - 1):
        whole = torch.randn(2, size, device=DEVICE)
        whole[1, place] = logits[1, place] = float("nan")
        for some in (whole, logits):
            values, tokens = sample.sample(some, temperature, zeros, zeros, 10)
            assert values.isnan().tolist() == [False, True]
            assert ((tokens >= 10) & (tokens < 10 + size)).all()


@given(
    queries=st.integers(1, 9),
    before=st.sampled_from([0, 1, 63, 64, 150]),
    kv_heads=st.integers(1, 2),
    group=st.sampled_from([1, 3, 8]),
    head_dim=st.sampled_from([8, 20]),
    kernel=st.sampled_from([1, 5]),
    span=st.sampled_from([64, 4096]),
    sinks=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
@examples(4, 24)
def test_votes(
    queries: int,
    before: int,
    kv_heads: int,
    group: int,
    head_dim: int,
    kernel: int,
    span: int,
    sinks: bool,
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(0)
    q = randn(queries, kv_heads * group, head_dim, dtype=dtype)
    k = randn(queries + before, kv_heads, head_dim, dtype=dtype).transpose(0, 1)
    more: Any = {"kernel": kernel, "sinks": randn(kv_heads * group) if sinks else None}
    for candidates in {before, max(0, before - 3), queries + before} - {0}:
        expected = snapkv_scores(q, k, 0.3, candidates=candidates, **more)
        ours = triton_snapkv.snapkv_scores(q, k, 0.3, candidates=candidates, span=span, **more)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    whole = triton_snapkv.snapkv_scores(q, k, 0.3, candidates=queries + before, kernel=1)
    torch.testing.assert_close(whole.sum(1).cpu(), torch.full((kv_heads,), float(queries * group)))


@given(round_=rounds())
@examples(12, 50)
def test_accept_and_commit(round_: DecidedRound) -> None:
    tokens, computed, row_spans = (part.to(DEVICE) for part in round_.copy())
    drafted, chosen = round_.drafted.to(DEVICE), round_.chosen.to(DEVICE)
    found = triton_verdict.accept(tokens, computed, row_spans, drafted, chosen, round_.most)
    state = round_.copy()
    expected = accept_drafts(*state, round_.drafted, round_.chosen, round_.most)
    for ours, wanted, count in zip(found.cpu(), expected, round_.row_spans[:, 3].tolist(), strict=True):
        assert torch.equal(ours[: 2 + count], wanted[: 2 + count])
    assert torch.equal(tokens.cpu(), round_.tokens)
    assert torch.equal(computed.cpu(), round_.computed)
    triton_verdict.commit(tokens, computed, row_spans, found)
    commit_tokens(*state, expected)
    assert torch.equal(tokens.cpu(), state[0])
    assert torch.equal(computed.cpu(), state[1])


@given(
    rows=st.lists(
        st.tuples(st.sampled_from([1, 1, 2, 5, 20]), st.sampled_from([0, 1, 15, 63, 64, 130])), min_size=1, max_size=3
    ),
    page_size=st.sampled_from([1, 7, 16]),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 5),
    head_dim=st.sampled_from([8, 16, 20]),
    per_head=st.booleans(),
    sinks=st.booleans(),
    span=st.sampled_from([64, 4096]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
@examples(6, 60)
def test_attention(
    rows: list[tuple[int, int]],
    page_size: int,
    kv_heads: int,
    group: int,
    head_dim: int,
    per_head: bool,
    sinks: bool,
    span: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    queries = [n for n, _ in rows]
    lengths = [n + before for n, before in rows]
    width = -(-max(lengths) // page_size)
    layer = pool(31, kv_heads, page_size, head_dim, dtype)
    if sinks:
        layer = draw_sinks(layer, kv_heads * group)
    pages = torch.randint(31, (len(rows), kv_heads, width) if per_head else (len(rows), width)).to(DEVICE)
    qkv = randn(sum(queries), kv_heads * (group + 2), head_dim, dtype=dtype)
    q = qkv[:, : kv_heads * group]  # a view of the rotation's output: tokens are not contiguous
    batch = AttentionBatch(queries, lengths, pages)
    oracle, backend = ReferenceAttention(page_size), GpuAttention(span)
    oracle.plan(batch)
    backend.plan(batch)
    expected, expected_lse = oracle.run(layer, q, head_dim**-0.5)
    o, lse = backend.run(layer, q, head_dim**-0.5)
    again, _ = backend.run(layer, q, head_dim**-0.5)  # one plan serves all layers
    assert o.dtype == dtype
    assert torch.equal(again, o)
    close(o, expected, dtype)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-4, atol=1e-4)


def test_sinks_count_once_in_a_list_that_is_cut() -> None:
    torch.manual_seed(0)
    layer, q = draw_sinks(pool(31, 2, 16, 16, torch.float32), 4), randn(2, 4, 16)
    batch = AttentionBatch([2], [300], torch.randint(31, (1, 19)).to(DEVICE))
    oracle, backend = ReferenceAttention(16), GpuAttention(64)
    oracle.plan(batch)
    backend.plan(batch)
    for found, expected in zip(backend.run(layer, q, 0.25), oracle.run(layer, q, 0.25), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_attention_from_lengths_on_the_device() -> None:
    """The host has only the shapes of the batch, not its lengths."""
    torch.manual_seed(0)
    layer = pool(9, 2, 4, 16, torch.float32)
    queries, lengths, pages = (part.to(DEVICE) for part in (torch.tensor([1, 4]), torch.tensor([9, 17]), PAGES))
    q = randn(5, 4, 16)
    oracle = ReferenceAttention(4)
    oracle.plan(AttentionBatch([1, 4], [9, 17], pages))
    expected, expected_lse = oracle.run(layer, q, 0.25)
    o, lse = attend(assign_tiles(queries, lengths, pages, len(q)), layer, q, 0.25)
    torch.testing.assert_close(o, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("sizes", "dtype"), each_value([(1, 71), (3, 71), (20, 8)], DTYPES), ids=str)
def test_attention_of_more_queries_than_a_program_holds(sizes: tuple[int, int], dtype: torch.dtype) -> None:
    """sizes: queries of a row, and heads per KV head."""
    queries, group = sizes
    torch.manual_seed(0)
    layer = pool(9, 1, 16, 16, dtype)
    batch = AttentionBatch([queries, 1], [queries + 70, 5], torch.randint(9, (2, 6)).to(DEVICE))
    oracle, backend = ReferenceAttention(16), GpuAttention(64)
    oracle.plan(batch)
    backend.plan(batch)
    q = randn(queries + 1, group, 16, dtype=dtype)
    o, lse = backend.run(layer, q, 0.25)
    expected, expected_lse = oracle.run(layer, q, 0.25)
    close(o, expected, dtype)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("span", [64, 4096])
def test_queries_that_see_nothing(span: int) -> None:
    """Rows of a captured batch are padded in front, so that their first queries may lie before the first slot."""
    torch.manual_seed(0)
    layer = pool(12, 1, 16, 16, torch.float32)
    real, padded = [1, 5, 2], 5
    lengths, pages = torch.tensor([1, 150, 3]), torch.randint(12, (3, 10))
    q = randn(3, padded, 2, 16)
    lengths, pages, counts = (part.to(DEVICE) for part in (lengths, pages, torch.full((3,), padded)))
    tiles = assign_tiles(counts, lengths, pages, 3 * padded, uniform=True)
    o, lse = attend(tiles, layer, q.flatten(0, 1), 0.25, span)
    last = [row * padded + query for row, n in enumerate(real) for query in range(padded - n, padded)]
    oracle = ReferenceAttention(16)
    oracle.plan(AttentionBatch(real, lengths.tolist(), pages))
    expected, expected_lse = oracle.run(layer, q.flatten(0, 1)[last], 0.25)
    close(o[last], expected, torch.float32)
    torch.testing.assert_close(lse[last], expected_lse, rtol=1e-4, atol=1e-4)
    blind = [row * padded + query for row, n in enumerate([1, 5, 3]) for query in range(padded - n)]
    assert o[blind].eq(0).all()
    assert lse[blind].isneginf().all()


PAGES = torch.tensor([[3, 1, 8, 0, 0], [2, 5, 4, 7, 6]])


@pytest.mark.parametrize("span", [64, 4096])
def test_attention_ignores_what_is_not_there(span: int) -> None:
    """Slots past the end of a row can hold overflow of another request."""
    torch.manual_seed(0)
    layer = pool(9, 1, 16, 16, torch.float32)
    backend = GpuAttention(span)
    backend.plan(AttentionBatch([2], [134], torch.arange(9, device=DEVICE)[None]))
    q = randn(2, 3, 16)
    expected, _ = backend.run(layer, q, 0.25)
    layer.k[8, :, 6:] = layer.v[8, :, 6:] = float("nan")
    assert torch.equal(backend.run(layer, q, 0.25)[0], expected)


@given(queries=st.lists(st.integers(1, 40), min_size=1, max_size=12))
@examples(50, 200)
def test_tiles_hold_every_query_once(queries: list[int]) -> None:
    counts = torch.tensor(queries)
    tiles = assign_tiles(counts, counts, torch.zeros(len(queries), 3, dtype=torch.int64), sum(queries))
    seen = [
        (row, query)
        for row, first in zip(tiles.row.tolist(), tiles.first.tolist(), strict=True)
        if row < len(queries)
        for query in range(first, min(first + tiles.block, queries[row]))
    ]
    assert sorted(seen) == [(row, query) for row, n in enumerate(queries) for query in range(n)]
    assert tiles.start.tolist() == [sum(queries[:row]) for row in range(len(queries))]


@pytest.mark.parametrize("queries", [1, 3, 5, 8, 9, 40])
def test_tiles_of_rows_of_one_size_are_all_used(queries: int) -> None:
    counts = torch.full((3,), queries)
    tiles = assign_tiles(counts, counts, torch.zeros(3, 3, dtype=torch.int64), 3 * queries, uniform=True)
    each = -(-queries // tiles.block)
    assert each == (1 if queries <= 8 else -(-queries // 16))  # a verify pass reads its KV once
    assert tiles.row.tolist() == [row for row in range(3) for _ in range(each)]
    assert tiles.first.tolist() == [at * tiles.block for at in range(each)] * 3


def test_what_does_not_fit_is_refused() -> None:
    layer = pool(9, 2, 4, 8, torch.float32)
    with pytest.raises(ValueError, match="have no float64"):
        pointwise.norm(randn(4, 8).double(), None, randn(8).double(), 1e-5)
    with pytest.raises(ValueError, match="norm: elements"):
        pointwise.norm(randn(8, 4).T, None, randn(8), 1e-5)
    index, otherwise = torch.zeros(1, dtype=torch.int64, device=DEVICE), layer.k.transpose(1, 2).contiguous()
    kv = LayerKV(otherwise.transpose(1, 2), layer.v)
    with pytest.raises(ValueError, match="pages of the pool"):
        pointwise.rotary(randn(1, 6, 8), randn(4, 4), randn(4, 4), index, index, kv, None)
