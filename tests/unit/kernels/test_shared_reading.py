"""Pages that rows share, read once: when, and with the same results as reading them for each row."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from kernels.attention.base import AttentionBatch, GraphAttention, GraphBatch, SharedPrefix
from kernels.attention.shared_reading import LAUNCH_BYTES, first_segment, largest, merge_prefixes, pays
from kernels.flashinfer.flashinfer_attention import FlashInferAttention
from kernels.flashinfer.flashinfer_graph import FlashInferGraphAttention
from kernels.flashinfer.flashinfer_sizes import Heads
from kernels.flashinfer.flashinfer_workspace import Workspace
from tests.support import fake_flashinfer
from tests.support.drawn_batches import shared_batches
from tests.support.kv_layers import draw_sinks
from tests.support.profiles import examples
from tests.support.rig import pool_layer
from tests.support.shared_batches import always_share, check_against_reference

pytest.importorskip("triton", reason="Triton is not installed: there are no builds for this platform")

from kernels.attention.triton_attention import GpuAttention, GpuPrefixGraphAttention
from kernels.gpu import INTERPRETED
from kernels.gpu.merge import merge_prefixes as merge_on_gpu
from kernels.gpu.query_tiles import SharedTiles

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
PAGES = 31
WORKSPACE = Workspace(torch.device("cpu"), (9, 0), multiprocessors=132)


def test_when_sharing_pays() -> None:
    """Llama 3.1 8B in bfloat16 reads 4 KiB per token and layer; a layer's merge of 8 queries takes 0.5 MB."""
    heads, page = Heads(32, 8, 128), 16
    merge = 2 * 2 * 8 * 32 * 129 * 4
    enough = -(-(LAUNCH_BYTES + merge) // (4096 * page * 7))  # pages that 8 rows share: the others need not read them
    assert enough * page == pytest.approx(1780, abs=16)
    rows = tuple(range(8))
    assert not pays([], page, heads, 2, 8)
    assert not pays([SharedPrefix(rows, enough - 1)], page, heads, 2, 8)
    assert pays([SharedPrefix(rows, enough)], page, heads, 2, 8)
    assert not pays([SharedPrefix(rows, enough)], page, heads, 2, 8 * 4)  # a larger merge
    assert pays([SharedPrefix(rows[:4], enough), SharedPrefix(rows[4:], 2 * enough)], page, heads, 2, 8)


def test_the_first_segment() -> None:
    """Rows 1 and 4 share two pages, rows 0, 2 and 3 one; row 5 none."""
    segment = first_segment([SharedPrefix((1, 4), 2), SharedPrefix((0, 2, 3), 1)], np.array([1, 2, 3, 1, 1, 2]))
    assert segment.rows.tolist() == [1, 0]
    assert segment.pages.tolist() == [2, 1]
    assert segment.queries.tolist() == [3, 5]
    assert segment.tokens.tolist() == [1, 2, 7, 0, 3, 4, 5, 6]
    assert segment.skipped.tolist() == [1, 2, 1, 1, 2, 0]


@given(
    data=st.data(),
    page_size=st.sampled_from([1, 7, 16]),
    kv_heads=st.integers(1, 2),
    group=st.sampled_from([1, 3, 5]),
    head_dim=st.sampled_from([16, 20, 64, 128]),
    per_head=st.booleans(),
    span=st.sampled_from([64, 4096]),
    sinks=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
@examples(5, 60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_triton(
    monkeypatch: pytest.MonkeyPatch,
    data: st.DataObject,
    page_size: int,
    kv_heads: int,
    group: int,
    head_dim: int,
    per_head: bool,
    span: int,
    sinks: bool,
    dtype: torch.dtype,
) -> None:
    always_share(monkeypatch)
    queries = data.draw(st.sampled_from([(1,), (1, 4), (3, 1, 20)]))
    batch = data.draw(
        shared_batches(page_size=page_size, pages=PAGES, queries=queries, heads=kv_heads if per_head else 0)
    )
    torch.manual_seed(0)
    layer = pool_layer(PAGES, kv_heads, page_size, head_dim, dtype)
    if sinks:
        layer = draw_sinks(layer, kv_heads * group)
    q = torch.randn(sum(batch.query_lengths), kv_heads * (group + 2), head_dim).to(dtype)[:, : kv_heads * group]
    ours = GpuAttention(span)
    ours.plan(batch)
    check_against_reference(ours.run(layer, q, head_dim**-0.5), batch, layer, q, head_dim**-0.5)
    assert (ours._tiles is not None and ours._tiles.prefixes is not None) == bool(batch.prefixes)


def test_tiles_of_prefixes_come_before_those_of_rows() -> None:
    tiles = SharedTiles(
        np.array([1, 1, 1]),
        np.array([40, 33, 9]),
        [SharedPrefix((0, 1), 2)],
        block=8,
        page_size=16,
        room=2,
    )
    found = tiles.tiles(torch.from_numpy(tiles.numbers), torch.zeros(3, 3, dtype=torch.int64))
    assert found.prefixes is not None
    assert found.prefixes.tiles == 2  # room for another prefix
    assert found.row.tolist() == [3, 5, 0, 1, 2]  # of prefixes, unused, of rows
    assert found.queries.tolist() == [1, 1, 1, 2, 0]
    assert found.lengths.tolist() == [40, 33, 9, 32, 0]
    assert found.prefixes.skipped.tolist() == [32, 32, 0, 0, 0]
    assert found.prefixes.listed.tolist() == [0, 1, 2, 0, 0]
    assert found.prefixes.shares.tolist() == [1, 1, 0]
    assert found.prefixes.slots == (32, 9)
    assert found.prefixes.tokens[found.start[3] :][:2].tolist() == [0, 1]


def test_where_it_does_not_pay_each_row_is_read_by_itself() -> None:
    layer = pool_layer(9, 1, 16, 16, torch.float32)
    batch = AttentionBatch([1, 1], [40, 40], torch.zeros(2, 3, dtype=torch.int64), prefixes=[SharedPrefix((0, 1), 2)])
    ours = GpuAttention()
    ours.plan(batch)
    ours.run(layer, torch.randn(2, 1, 16), 0.25)
    assert ours._tiles is not None
    assert ours._tiles.prefixes is None


@given(
    data=st.data(),
    page_size=st.sampled_from([1, 7, 16]),
    kv_heads=st.integers(1, 2),
    group=st.sampled_from([1, 3]),
    head_dim=st.sampled_from([64, 128]),
    fused=st.booleans(),
    sinks=st.booleans(),
)
@examples(15, 60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_flashinfer(
    monkeypatch: pytest.MonkeyPatch,
    data: st.DataObject,
    page_size: int,
    kv_heads: int,
    group: int,
    head_dim: int,
    fused: bool,
    sinks: bool,
) -> None:
    """Rows of all kinds, in tiles of their own, beside prefixes. fused: merged by the kernel."""
    always_share(monkeypatch)
    monkeypatch.setitem(sys.modules, "flashinfer", fake_flashinfer)
    queries = data.draw(st.sampled_from([(1,), (1, 4), (1, 30, 130)]))
    batch = data.draw(shared_batches(page_size=page_size, pages=PAGES, queries=queries))
    torch.manual_seed(0)
    layer = pool_layer(PAGES, kv_heads, page_size, head_dim, torch.float16)
    if sinks:
        layer = draw_sinks(layer, kv_heads * group)
    ours = FlashInferAttention(page_size, WORKSPACE, merge_on_gpu if fused else merge_prefixes)
    ours.plan(batch)
    for _ in range(2):  # layers of a forward
        q = torch.randn(sum(batch.query_lengths), kv_heads * (group + 2), head_dim).half()[:, : kv_heads * group]
        check_against_reference(ours.run(layer, q, head_dim**-0.5), batch, layer, q, head_dim**-0.5)
    assert (ours._prefixes is not None) == bool(batch.prefixes)
    alone = AttentionBatch(batch.query_lengths, batch.kv_lengths, batch.pages)
    ours.plan(alone)
    check_against_reference(ours.run(layer, q, head_dim**-0.5), alone, layer, q, head_dim**-0.5)
    assert ours._prefixes is None


def test_flashinfer_reads_lists_of_heads_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads are rows there; nothing but SnapKV's own pool has such lists, whose rows share no page."""
    always_share(monkeypatch)
    monkeypatch.setitem(sys.modules, "flashinfer", fake_flashinfer)
    layer = draw_sinks(pool_layer(9, 2, 16, 64, torch.float16), 4)
    lists = torch.zeros(2, 2, 3, dtype=torch.int64)
    batch = AttentionBatch([1, 1], [40, 40], lists, prefixes=[SharedPrefix((0, 1), 2)])
    ours = FlashInferAttention(16, WORKSPACE)
    ours.plan(batch)
    q = torch.randn(2, 4, 64).half()
    check_against_reference(ours.run(layer, q, 0.1), batch, layer, q, 0.1)
    assert ours._prefixes is None


def graph_attention(library: str, batch: GraphBatch, page_size: int) -> GraphAttention:
    if library == "triton":
        return GpuPrefixGraphAttention(batch, 128)
    return FlashInferGraphAttention(page_size, WORKSPACE, batch)


@given(data=st.data(), queries=st.sampled_from([1, 4]), page_size=st.sampled_from([4, 16]))
@pytest.mark.parametrize("library", ["triton", "flashinfer 0.7", "flashinfer 0.6"])
@examples(2, 25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_captured_batches(
    monkeypatch: pytest.MonkeyPatch, library: str, data: st.DataObject, queries: int, page_size: int
) -> None:
    """Plans with different prefixes, or none, one after another; padded rows, and queries that are padding."""
    monkeypatch.setitem(sys.modules, "flashinfer", fake_flashinfer)
    monkeypatch.setattr(
        "kernels.flashinfer.flashinfer_graph.takes_uniform_queries", lambda library_: library.endswith("7")
    )
    rows, width = 4, 30
    pages, lengths = torch.zeros(rows, width, dtype=torch.int64), torch.ones(rows, dtype=torch.int64)
    batch = GraphBatch(queries, pages, lengths, prefixes=2)
    ours = graph_attention(library, batch, page_size)
    torch.manual_seed(0)
    layer = pool_layer(PAGES, 1, page_size, 64, torch.float16)
    if queries == 4:
        layer = draw_sinks(layer, 2)
    for _ in range(3):
        drawn = data.draw(
            shared_batches(page_size=page_size, pages=PAGES, queries=range(1, queries + 1), max_rows=rows)
        )
        spare = rows - len(drawn.query_lengths)
        kv_lengths = [*drawn.kv_lengths, *[1] * spare]
        pages[: rows - spare, : drawn.pages.shape[1]] = drawn.pages
        lengths.copy_(torch.tensor(kv_lengths))
        ours.plan(kv_lengths, drawn.prefixes)
        own = [*drawn.query_lengths, *[0] * spare]
        real = torch.tensor([[i >= queries - n for i in range(queries)] for n in own]).flatten()
        for _ in range(2):
            q = torch.randn(rows * queries, 2, 64).half()
            o, lse = ours.run(layer, q, 0.1)
            check_against_reference((o[real], lse[real]), drawn, layer, q[real], 0.1)


def test_only_the_largest_prefixes_are_read_once() -> None:
    prefixes = [SharedPrefix((0, 1), 9), SharedPrefix((2, 3, 4), 7), SharedPrefix((5, 6), 2)]
    assert largest(prefixes, 1) == [prefixes[1]]
    assert largest(prefixes, 8) == [prefixes[1], prefixes[0], prefixes[2]]
