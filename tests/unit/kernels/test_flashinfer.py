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
from kernels.attention.base import AttentionBatch, GraphShape
from kernels.attention.flashinfer import FlashInferAttention, load_flashinfer, make_workspace, merge_states
from kernels.attention.reference_attention import ReferenceAttention, merge_segments
from kernels.kv_cache import LayerKV
from kernels.reference_ops import REFERENCE, ReferenceOps
from models.loader import random_model
from parallel.group import Group
from tests.support import fake_flashinfer
from tests.support.engines import TINY, run, tiny_engine, tokens
from tests.support.profiles import examples
from tests.support.rig import CPU, pool_layer

PAGES = 23


@pytest.fixture(autouse=True)
def double(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", fake_flashinfer)


def backend(page_size: int, graph_shape: GraphShape | None = None) -> FlashInferAttention:
    return FlashInferAttention(page_size, torch.zeros(16, dtype=torch.uint8), graph_shape)


def batch_of(rows: list[tuple[int, int]], page_size: int, kv_heads: int = 0) -> AttentionBatch:
    """Build a batch with random pages. rows: (queries, tokens before them). kv_heads: number of page lists per row; 0:
    one for all heads."""
    queries = [n for n, _ in rows]
    lengths = [n + before for n, before in rows]
    width = -(-max(lengths) // page_size) + 1
    shape = (len(rows), kv_heads, width) if kv_heads else (len(rows), width)
    return AttentionBatch(queries, lengths, torch.randint(PAGES, shape))


def check(
    ours: FlashInferAttention,
    batch: AttentionBatch,
    layer: LayerKV,
    heads: int,
    scale: float = 0.1,
    *,
    tokens: int | None = None,
) -> None:
    """Compare `ours` with the reference backend. tokens: number of queries including padding."""
    oracle = ReferenceAttention(layer.k.shape[2])
    oracle.plan(batch)
    ours.plan(batch)
    asked = sum(batch.query_lengths)
    for _ in range(2):  # layers of a forward
        q = torch.randn(tokens or asked, heads, 64).half()
        expected, expected_lse = oracle.run(layer, q[:asked], scale)
        o, lse = ours.run(layer, q, scale)
        torch.testing.assert_close(o[:asked], expected, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(lse[:asked], expected_lse, rtol=1e-3, atol=1e-3)
        assert torch.equal(ours.run(layer, q, scale)[0][:asked], o[:asked])


@given(
    rows=st.lists(st.tuples(st.sampled_from([1, 1, 2, 5]), st.sampled_from([0, 1, 3, 4, 17])), min_size=1, max_size=4),
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
    keep = fake_flashinfer._Wrapper._keep

    def note(self: fake_flashinfer._Wrapper, *arguments: Any) -> None:
        planned.append(self)
        keep(self, *arguments)

    monkeypatch.setattr(fake_flashinfer._Wrapper, "_keep", note)
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
    assert all(wrapper.use_tensor_cores for wrapper in planned)


@pytest.mark.parametrize("per_head", [0, 2])
def test_fixed_batches_keep_their_addresses(per_head: int) -> None:
    torch.manual_seed(0)
    ours = backend(4, GraphShape(rows=2, tokens=6, width=10))
    layer = pool_layer(PAGES, 2, 4, 64, torch.float16)
    addresses = set()
    for rows in ([(3, 5), (3, 20)], [(1, 9), (5, 0)], [(1, 30), (3, 1)], [(1, 2), (1, 0)]):
        check(ours, batch_of(rows, 4, per_head), layer, 4, tokens=6)
        (ring,) = ours._wrappers.values()
        (planned,) = ring
        order = None if ours._order is None else ours._order.data_ptr()
        addresses.add((planned.wrapper, *(buffer.data_ptr() for buffer in planned.wrapper._buffers), order))
    assert len(addresses) == 1
    with pytest.raises(ValueError, match="1 rows with 6 queries and lists of 3 pages, not the 2 with at most 6"):
        ours.plan(batch_of([(6, 0)], 4))


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
    "kv",
    [
        {"budget": 16, "sink": 4},
        {"budget": 16, "sink": 4, "positions": "relative"},
        {"policy": "snapkv", "budget": 24, "recent": 8, "queries": 4},
    ],
    ids=["window", "relative", "snapkv"],
)
def test_engines_on_it(kv: dict[str, Any]) -> None:
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
    expected = run(tiny_engine(oracle, gamma=0), requests)
    engine = tiny_engine(model, gamma=3, speculation={"kv": kv})
    outputs = run(engine, requests)
    assert engine.stats().accepted_tokens > 0
    assert engine.stats().rejections > 0
    assert sum(tokens(outputs[name]) == tokens(expected[name]) for name in outputs) >= 3


def test_workspace() -> None:
    assert make_workspace(CPU).nbytes == 128 * 2**20


def test_segments_are_merged() -> None:
    torch.manual_seed(0)
    outputs = [torch.randn(5, 3, 64).half() for _ in range(3)]
    lses = [torch.randn(5, 3) * 5 for _ in range(3)]
    expected, expected_lse = merge_segments(outputs, lses)
    merged, lse = merge_states(outputs, lses)
    torch.testing.assert_close(merged, expected, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)
