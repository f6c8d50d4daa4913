"""FlashInfer's own kernels, through our backend, against the reference backend."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from kernels.attention.base import AttentionBatch, GraphBatch
from kernels.attention.reference_attention import ReferenceAttention
from kernels.flashinfer.flashinfer_attention import FlashInferAttention
from kernels.flashinfer.flashinfer_graph import FlashInferGraphAttention
from kernels.flashinfer.flashinfer_workspace import make_workspace
from kernels.kv.kv_pool import LayerKV
from tests.support.ballots import VoteCase, check_captured, check_votes, draw_batch
from tests.support.kv_layers import draw_sinks
from tests.support.profiles import only_in_all

if not torch.cuda.is_available():
    pytest.skip("no CUDA device is present", allow_module_level=True)
pytest.importorskip("flashinfer", reason="FlashInfer is not installed: pip install 'magicdec[cuda]'")

from kernels.gpu.cuda_graphs import CudaGraphs

CUDA = torch.device("cuda")
ROWS = [
    ([1] * 6, [30, 4000, 17, 900, 64, 2500]),  # decode
    ([5, 1, 3, 5], [3000, 40, 800, 5]),  # verify
    ([700, 1, 5, 100, 1], [1000, 2000, 300, 170, 4000]),  # chunks of prompts in the same batch
]


def layer_of(kv_heads: int, head_dim: int, dtype: torch.dtype) -> LayerKV:
    k, v = torch.randn(2, 300, kv_heads, 16, head_dim, device=CUDA).to(dtype)
    return LayerKV(k, v)


def pages_of(rows: int, kv_heads: int, per_head: bool) -> torch.Tensor:
    return torch.randint(300, (rows, kv_heads, 256) if per_head else (rows, 256), device=CUDA)


def captured(queries: int, lists: tuple[int, ...]) -> GraphBatch:
    pages = torch.zeros(lists, dtype=torch.int64, device=CUDA)
    return GraphBatch(queries, pages, torch.ones(lists[0], dtype=torch.int64, device=CUDA))


@pytest.mark.parametrize("per_head", [False, True], ids=["shared", "per_head"])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(32, 8, 128), (9, 3, 64), (32, 32, 128)])
# FlashInfer compiles a module per dtype and head_dim, which takes a minute; those of bfloat16 may lie ready.
@pytest.mark.parametrize("dtype", [torch.bfloat16, only_in_all(torch.float16)], ids=str)
def test_equals_the_oracle(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, per_head: bool) -> None:
    torch.manual_seed(0)
    layer = layer_of(kv_heads, head_dim, dtype)
    if kv_heads == 8:
        layer = draw_sinks(layer, heads)
    oracle, backend = ReferenceAttention(16), FlashInferAttention(16, make_workspace(CUDA))
    for queries, lengths in ROWS:
        batch = AttentionBatch(queries, lengths, pages_of(len(queries), kv_heads, per_head))
        oracle.plan(batch)
        backend.plan(batch)
        for _ in range(2):
            q = torch.randn(sum(queries), heads, head_dim, device=CUDA).to(dtype)
            expected, expected_lse = oracle.run(layer, q, head_dim**-0.5)
            o, lse = backend.run(layer, q, head_dim**-0.5)
            torch.testing.assert_close(o, expected, rtol=1e-2, atol=1e-2)
            torch.testing.assert_close(lse, expected_lse, rtol=1e-3, atol=1e-3)


def test_plans_made_ahead_of_the_device() -> None:
    """Many steps are enqueued before any result is read; no step reads another one's plan."""
    torch.manual_seed(0)
    layer = layer_of(8, 128, torch.bfloat16)
    oracle, backend = ReferenceAttention(16), FlashInferAttention(16, make_workspace(CUDA))
    q = torch.randn(6, 32, 128, device=CUDA).bfloat16()
    batches = [AttentionBatch([1] * 6, [7 + 300 * step] * 6, pages_of(6, 8, False)) for step in range(12)]
    backend.plan(batches[0])
    backend.run(layer, q, 0.1)  # compiles
    outs = []
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)  # type: ignore[no-untyped-call]
    for batch in batches:
        backend.plan(batch)
        outs.append(backend.run(layer, q, 0.1)[0])
    for batch, out in zip(batches, outs, strict=True):
        oracle.plan(batch)
        torch.testing.assert_close(out, oracle.run(layer, q, 0.1)[0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("heads", [None, 8], ids=["shared", "per_head"])
@pytest.mark.parametrize("queries", [1, 4])
def test_captured_runs_follow_new_plans(heads: int | None, queries: int) -> None:
    """Rows with fewer queries are padded in front, also where their KV is shorter than the padding."""
    torch.manual_seed(0)
    layer = layer_of(8, 128, torch.bfloat16)
    batch = captured(queries, (3, 256) if heads is None else (3, heads, 256))
    ours, oracle = FlashInferGraphAttention(16, make_workspace(CUDA), batch), ReferenceAttention(16)
    q = torch.randn(3 * queries, 32, 128, device=CUDA).bfloat16()
    ours.plan([1, 1, 1])
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        ours.run(layer, q, 0.1)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = ours.run(layer, q, 0.1)
    for lengths in ([4000, 4096, 2500], [17, 1000, 5], [1, 2, 3], [900, 1, 2222]):
        counts = [min(queries, length, 1 + row) for row, length in enumerate(lengths)]
        batch.pages.copy_(pages_of(3, 8, heads is not None))
        batch.lengths.copy_(torch.tensor(lengths))
        ours.plan(lengths)
        graph.replay()
        oracle.plan(AttentionBatch(counts, lengths, batch.pages))
        real = torch.tensor([i >= queries - n for n in counts for i in range(queries)], device=CUDA)
        expected, expected_lse = oracle.run(layer, q[real], 0.1)
        torch.testing.assert_close(out[real], expected, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(lse[real], expected_lse, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("per_head", [False, True], ids=["shared", "per_head"])
@pytest.mark.parametrize("per_layer", [False, True], ids=["all_layers", "per_layer"])
def test_votes_and_lists_of_layers(per_layer: bool, per_head: bool) -> None:
    """Eager and captured; what is captured reads another list in each layer."""
    rows = ((4, 2996, (0, 3)), (1, 16, (-1, -1)), (3, 900, (1, -1)))
    for unit in (16, 1):
        case = VoteCase(rows, 16, 8, 4, 128, per_head, per_layer, unit, shared=False, sinks=per_head, seed=0)
        batch = draw_batch(case, torch.bfloat16, "cuda")
        workspace = make_workspace(CUDA)
        check_votes(FlashInferAttention(16, workspace), batch, 1e-2)
        check_captured(
            partial(FlashInferGraphAttention, 16, workspace),
            CudaGraphs(CUDA).capture,
            batch,
            votes=True,
            tolerance=1e-2,
        )


def test_captured_and_eager_attention_share_memory() -> None:
    """An eager batch between two replays, and a larger capture after a smaller one, change nothing."""
    torch.manual_seed(0)
    layer, shared = layer_of(8, 128, torch.bfloat16), make_workspace(CUDA)
    eager, graphs = FlashInferAttention(16, shared), []
    for rows in (2, 64):
        batch = captured(4, (rows, 256))
        ours = FlashInferGraphAttention(16, shared, batch)
        q, lengths = torch.randn(4 * rows, 32, 128, device=CUDA).bfloat16(), [3000] * rows
        batch.pages.copy_(pages_of(rows, 8, False))
        batch.lengths.fill_(3000)
        ours.plan(lengths)
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            expected = ours.run(layer, q, 0.1)[0].clone()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = ours.run(layer, q, 0.1)[0]
        graphs.append((graph, q, out, expected))
    for graph, _, out, expected in graphs:
        eager.plan(AttentionBatch([1] * 6, [4000] * 6, pages_of(6, 8, False)))
        eager.run(layer, torch.randn(6, 32, 128, device=CUDA).bfloat16(), 0.1)
        graph.replay()
        torch.testing.assert_close(out, expected)
