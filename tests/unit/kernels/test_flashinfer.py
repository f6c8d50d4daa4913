"""The FlashInfer backend against the reference backend, over a fake of FlashInfer: this tests the calls that the
backend makes. tests/gpu tests what FlashInfer computes."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from engine.messages import AddRequest
from engine.params import SamplingParams
from kernels.attention.base import AttentionBatch, GraphBatch
from kernels.attention.reference_attention import ReferenceAttention
from kernels.flashinfer.flashinfer_attention import FlashInferAttention
from kernels.flashinfer.flashinfer_graph import FlashInferGraphAttention, can_capture
from kernels.flashinfer.flashinfer_sizes import Heads, eager_float_bytes
from kernels.flashinfer.flashinfer_workspace import Workspace, flat_pages, list_pages, load_flashinfer
from kernels.kv.kv_pool import LayerKV
from kernels.reference_ops import REFERENCE, ReferenceOps
from models.loader import random_model
from parallel.group import Group
from tests.support import fake_flashinfer
from tests.support.engines import TINY, run, tiny_engine, tokens
from tests.support.profiles import examples, only_in_all
from tests.support.rig import CPU, pool_layer

PAGES = 23


@pytest.fixture(autouse=True)
def double(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", fake_flashinfer)


def workspace(capability: tuple[int, int] = (9, 0)) -> Workspace:
    return Workspace(CPU, capability, multiprocessors=132)


def backend(page_size: int, capability: tuple[int, int] = (9, 0)) -> FlashInferAttention:
    return FlashInferAttention(page_size, workspace(capability))


def batch_of(rows: list[tuple[int, int]], page_size: int, kv_heads: int = 0) -> AttentionBatch:
    """Build a batch with random pages. rows: (queries, tokens before them). kv_heads: number of page lists per row; 0:
    one for all heads."""
    queries = [n for n, _ in rows]
    lengths = [n + before for n, before in rows]
    width = -(-max(lengths) // page_size) + 1
    shape = (len(rows), kv_heads, width) if kv_heads else (len(rows), width)
    return AttentionBatch(queries, lengths, torch.randint(PAGES, shape))


def captured(queries: int, lists: tuple[int, ...]) -> GraphBatch:
    return GraphBatch(queries, torch.zeros(lists, dtype=torch.int64), torch.ones(lists[0], dtype=torch.int64))


def check(
    ours: FlashInferAttention, batch: AttentionBatch, layer: LayerKV, heads: int, scale: float = 0.1, dim: int = 64
) -> None:
    """Compare `ours` with the reference backend."""
    oracle = ReferenceAttention(layer.k.shape[2])
    oracle.plan(batch)
    ours.plan(batch)
    for _ in range(2):  # layers of a forward
        q = torch.randn(sum(batch.query_lengths), heads + 2, dim).half()[:, :heads]  # as in a forward, with a stride
        expected, expected_lse = oracle.run(layer, q, scale)
        o, lse = ours.run(layer, q, scale)
        torch.testing.assert_close(o, expected, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(lse, expected_lse, rtol=1e-3, atol=1e-3)
        assert torch.equal(ours.run(layer, q, scale)[0], o)


@given(
    rows=st.lists(
        st.tuples(st.sampled_from([1, 1, 2, 5, 30, 130]), st.sampled_from([0, 1, 3, 4, 17])), min_size=1, max_size=4
    ),
    page_size=st.sampled_from([1, 4, 7]),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 3, 4]),
    per_head=st.booleans(),
    seed=st.integers(0, 100),
)
@examples(15, 50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_equals_the_oracle(
    rows: list[tuple[int, int]], page_size: int, kv_heads: int, group: int, per_head: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    layer = pool_layer(PAGES, kv_heads, page_size, 64, torch.float16)
    batch = batch_of(rows, page_size, kv_heads if per_head else 0)
    check(backend(page_size), batch, layer, kv_heads * group)


@given(
    rows=st.lists(st.tuples(st.sampled_from([1, 5, 30, 130]), st.sampled_from([0, 3, 17])), min_size=1, max_size=4),
    per_head=st.booleans(),
    seed=st.integers(0, 100),
)
@examples(15, 50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_late_lists_are_read_as_they_are_when_their_layer_runs(
    rows: list[tuple[int, int]], per_head: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    layers, (ours, oracle) = 3, (backend(4), ReferenceAttention(4))
    first = pool_layer(PAGES, 2, 4, 64, torch.float16)
    for _ in range(2):  # sizes of heads are known from the second forward on, so `plan` lists pages
        batch = batch_of(rows, 4, 2 if per_head else 0)
        lists = batch.pages.expand(layers, *batch.pages.shape).clone()
        batch = dataclasses.replace(batch, pages=lists, per_layer=True, late=True)
        ours.plan(batch)
        oracle.plan(batch)
        for index in range(layers):
            lists[index].random_(PAGES)
            layer = dataclasses.replace(first, index=index)
            q = torch.randn(sum(batch.query_lengths), 4, 64).half()
            torch.testing.assert_close(ours.run(layer, q, 0.1), oracle.run(layer, q, 0.1), rtol=2e-3, atol=2e-3)


def test_one_backend_serves_many_batches() -> None:
    """Different shapes, numbers of heads and scales, one after another."""
    torch.manual_seed(0)
    ours = backend(4)
    for kv_heads, heads, scale in ((2, 4, 0.1), (2, 4, 0.2), (1, 8, 0.2)):
        layer = pool_layer(PAGES, kv_heads, 4, 64, torch.float16)
        for rows in ([(1, 5), (1, 9)], [(3, 5), (1, 9)], [(1, 70)]):
            for per_head in (0, kv_heads):
                check(ours, batch_of(rows, 4, per_head), layer, heads, scale)


def test_a_plan_is_made_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan is made inside `plan`, once shapes are known, so that a captured run can follow. Later plans use other
    wrappers."""
    planned: list[Any] = []
    keep = fake_flashinfer.FakeWrapper._keep

    def note(self: fake_flashinfer.FakeWrapper, *arguments: Any) -> None:
        planned.append(self)
        keep(self, *arguments)

    monkeypatch.setattr(fake_flashinfer.FakeWrapper, "_keep", note)
    layer = pool_layer(PAGES, 1, 4, 64, torch.float16)
    ours = backend(4)
    q = torch.randn(2, 4, 64).half()
    ours.plan(batch_of([(1, 3), (1, 9)], 4))
    assert len(planned) == 0
    for count in range(1, 8):
        for _ in range(3):
            ours.run(layer, q, 0.1)
        assert len(planned) == count
        ours.plan(batch_of([(1, 3), (1, 9 + count)], 4))
        assert len(planned) == count + 1
    assert len(set(planned[:4])) == len(set(planned[2:6])) == 4
    assert len(set(planned)) == 4


@pytest.mark.parametrize(
    ("capability", "kernels"),
    [((9, 0), ["fa2", "fa2", "fa3"]), ((8, 0), ["fa2", "fa2"]), only_in_all((12, 0), ["fa2", "fa2"])],
)
def test_rows_are_parted_by_what_suits_them(capability: tuple[int, int], kernels: list[str]) -> None:
    """Rows up to 64 packed queries, longer ones, and those that fill tiles of FA3. Each part is in order, so the first
    has the decoding rows and the verify pass, wherever they are."""
    torch.manual_seed(0)
    layer = pool_layer(PAGES, 2, 4, 64, torch.float16)
    ours = backend(4, capability)
    rows = [(130, 3), (1, 70), (20, 9), (16, 4), (127, 0), (128, 0), (1, 3)]
    for per_head in (0, 2):
        check(ours, batch_of(rows, 4, per_head), layer, heads=8)
        assert [part.planned.wrapper.backend for part in ours._parts] == kernels
        scale = per_head or 1
        counts = [part.end - part.first for part in ours._parts]
        assert counts == ([18 * scale, 147 * scale, 258 * scale] if len(kernels) == 3 else [18 * scale, 405 * scale])
    assert ours._order is not None
    for rows in ([(1, 3), (2, 8), (1, 9)], [(300, 2), (200, 0)], [(1, 9), (16, 2), (70, 8)]):
        check(ours, batch_of(rows, 4), layer, heads=8)
        assert ours._order is None  # parts are slices of q


def test_memory_grows_with_what_is_planned() -> None:
    """Wrappers follow, and none is planned with less than its batch needs."""
    shared = workspace()
    small, large = (FlashInferAttention(4, shared) for _ in range(2))
    layer, wide = pool_layer(PAGES, 1, 4, 64, torch.float16), pool_layer(PAGES, 1, 4, 128, torch.float16)
    check(small, batch_of([(1, 5)], 4), layer, heads=4)
    before = len(shared.take(0))
    assert before == eager_float_bytes(Heads(4, 1, 64), 132)
    check(large, batch_of([(1, 5)], 4), wide, heads=8, dim=128)
    assert len(shared.take(0)) > 3 * before
    for step in range(5):
        check(small, batch_of([(1, 5 + step)], 4), layer, heads=4)
    (ring,) = small._wrappers.values()
    assert all(planned.wrapper._floats is shared.take(0) for planned in ring)
    assert all(len(planned.wrapper._ints) == 64 << 10 for planned in ring)
    small.plan(batch_of([(1, 5)] * 16_000, 4))
    assert len(ring[-1].wrapper._ints) == 512 << 10


@pytest.mark.parametrize("uniform", [True, False], ids=["0.7", "0.6"])
@pytest.mark.parametrize("heads", [None, 2])
@pytest.mark.parametrize("queries", [1, 4])
def test_captured_plans_keep_their_addresses(
    monkeypatch: pytest.MonkeyPatch, uniform: bool, heads: int | None, queries: int
) -> None:
    """Rows with fewer queries have padding in front, which may see nothing and gives NaN in the fake. Longer lists than
    before, and shorter ones; entries after a list are other pages."""
    monkeypatch.setattr("kernels.flashinfer.flashinfer_graph.takes_uniform_queries", lambda library: uniform)
    torch.manual_seed(0)
    batch = captured(queries, (3, 10) if heads is None else (3, heads, 10))
    ours, oracle = FlashInferGraphAttention(4, workspace(), batch), ReferenceAttention(4)
    layer = pool_layer(PAGES, 2, 4, 64, torch.float16)
    addresses = set()
    for rows in (
        [(3, 5), (3, 20), (1, 0)],
        [(1, 9), (4, 0), (2, 33)],
        [(1, 36), (3, 1), (1, 0)],
        [(1, 2), (1, 0), (1, 1)],
    ):
        counts = [min(n, queries) for n, _ in rows]
        lengths = [n + before for n, (_, before) in zip(counts, rows, strict=True)]
        batch.pages.copy_(torch.randint(PAGES, batch.pages.shape))
        batch.lengths.copy_(torch.tensor(lengths))
        ours.plan(lengths)
        oracle.plan(AttentionBatch(counts, lengths, batch.pages))
        real = torch.tensor([[i >= queries - n for i in range(queries)] for n in counts]).flatten()
        for _ in range(2):
            q = torch.randn(3 * queries, 4, 64).half()
            o, lse = ours.run(layer, q, 0.1)
            expected, expected_lse = oracle.run(layer, q[real], 0.1)
            torch.testing.assert_close(o[real], expected, rtol=2e-3, atol=2e-3)
            torch.testing.assert_close(lse[real], expected_lse, rtol=1e-3, atol=1e-3)
        assert ours._planned is not None
        wrapper = ours._planned.wrapper
        kept = (*wrapper._buffers, wrapper._floats, wrapper._ints)
        addresses.add((wrapper, *(buffer.data_ptr() for buffer in kept)))
    assert len(addresses) == 1
    assert type(wrapper).__name__ == f"Batch{'Decode' if uniform else 'Prefill'}WithPagedKVCacheWrapper"
    assert wrapper.backend == "fa2"
    with pytest.raises(ValueError, match="does not match"):
        wrapper.run(torch.randn(7 * queries, *q.shape[1:]).half(), (layer.k, layer.v), out=o, lse=lse)


def test_what_can_be_captured() -> None:
    for head_dim, queries, expected in ((64, 32, True), (128, 17, True), (128, 33, False), (256, 16, True)):
        assert can_capture(head_dim, captured(queries, (8, 4))) == expected
    assert not can_capture(256, captured(17, (8, 4)))


@given(data=st.data(), heads=st.sampled_from([0, 1, 3]), seed=st.integers(0, 100))
@examples(20, 100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_lists_of_pages(data: st.DataObject, heads: int, seed: int) -> None:
    torch.manual_seed(seed)
    rows, width = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 6))
    pages = torch.randint(PAGES, (rows, heads, width) if heads else (rows, width))
    flat = flat_pages(AttentionBatch([1] * rows, [1] * rows, pages), pages)
    counts = [data.draw(st.integers(1, width)) for _ in range(len(flat))]
    indptr = torch.tensor([0, *counts]).cumsum(0).int()
    listed = torch.full((int(indptr[-1]) + data.draw(st.integers(1, 4)),), -1, dtype=torch.int32)
    list_pages(flat, indptr, listed)
    expected = [
        int(pages[row // heads, row % heads, i]) * heads + row % heads if heads else int(pages[row, i])
        for row, count in enumerate(counts)
        for i in range(count)
    ]
    assert listed[: len(expected)].tolist() == expected
    assert (listed[len(expected) : -1] == -1).all()


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("rows", [[(1, 5), (2, 30)], [(1, 5), (130, 9), (3, 11)]])
def test_lists_that_change_until_a_layer_runs(per_head: bool, rows: list[tuple[int, int]]) -> None:
    torch.manual_seed(1)
    layer, ours, oracle = pool_layer(PAGES, 2, 4, 64, torch.float16), backend(4), ReferenceAttention(4)
    for _ in range(2):  # the first plan waits for the first run
        batch = batch_of(rows, 4, 2 if per_head else 0)
        pages = torch.stack([batch.pages, batch.pages, batch.pages])
        batch = dataclasses.replace(batch, pages=pages, per_layer=True, late=True)
        oracle.plan(batch)
        ours.plan(batch)
        for index in range(3):
            pages[index] = torch.randint(PAGES, pages.shape[1:])
            mine, q = LayerKV(layer.k, layer.v, index), torch.randn(sum(batch.query_lengths), 4, 64).half()
            torch.testing.assert_close(ours.run(mine, q, 0.1)[0], oracle.run(mine, q, 0.1)[0], rtol=2e-3, atol=2e-3)


def test_what_flashinfer_cannot_is_refused() -> None:
    ours = backend(4)
    ours.plan(batch_of([(2, 3)], 4))
    for dtype, head_dim, said in ((torch.float32, 64, "float32 with head_dim 64"), (torch.float16, 80, "head_dim 80")):
        layer = pool_layer(PAGES, 1, 4, head_dim, dtype)
        with pytest.raises(ValueError, match=said):
            ours.run(layer, torch.zeros(2, 1, head_dim, dtype=dtype), 0.1)


def test_without_flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with pytest.raises(ImportError, match=r"pip install 'magicdec\[cuda\]'"):
        backend(4)
    with pytest.raises(ImportError):
        load_flashinfer()


class OverTheDouble(ReferenceOps):
    def attention(self, page_size: int, head_dim: int) -> FlashInferAttention:  # type: ignore[override]
        return backend(page_size)


@pytest.mark.parametrize(
    ("kv", "target"),
    [
        only_in_all({"budget": 16, "sink": 4}, None),
        ({"budget": 16, "sink": 4, "positions": "relative"}, None),
        ({"policy": "snapkv", "budget": 24, "recent": 8, "queries": 4}, None),
        only_in_all({"policy": "quest", "budget": 12, "sink": 4}, None),
        ({"budget": 16, "sink": 4}, {"policy": "quest", "budget": 8, "sink": 4, "interval": 3}),
    ],
    ids=["window", "relative", "snapkv", "quest", "target"],
)
def test_engines_on_it(kv: dict[str, Any], target: dict[str, Any] | None) -> None:
    """Drafts, views, page lists per head and verify passes give the reference backend's output, except for near
    ties."""
    config = dataclasses.replace(TINY, head_dim=64)
    model, oracle = (
        random_model(config, 0, torch.float16, CPU, Group.single(), ops) for ops in (OverTheDouble(), REFERENCE)
    )
    requests = [
        AddRequest(
            str(i),
            [2 + (i * 7 + j) % 60 for j in range(3 + 11 * i)],
            SamplingParams(max_tokens=24, temperature=temperature, seed=i, ignore_eos=True),
        )
        for i, temperature in enumerate([0.0, 1.0, 0.7, 0.0])
    ]
    expected = run(tiny_engine(oracle, gamma=0, target_kv=target), requests)
    engine = tiny_engine(model, gamma=3, speculation={"kv": kv}, target_kv=target)
    outputs = run(engine, requests)
    assert engine.stats().accepted_tokens > 0
    assert engine.stats().rejections > 0
    assert sum(tokens(outputs[name]) == tokens(expected[name]) for name in outputs) >= 3
