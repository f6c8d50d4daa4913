"""Pages that rows share, read once, on a GPU: eager and captured, in shapes of real models, against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.attention.base import AttentionBatch, GraphAttention, GraphBatch, SharedPrefix
from kernels.kv.kv_pool import LayerKV
from tests.support.shared_batches import always_share, check_against_reference

if not torch.cuda.is_available():
    pytest.skip("no CUDA device is present", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed: pip install 'magicdec[cuda]'")

from kernels.attention.triton_attention import GpuAttention, GpuPrefixGraphAttention
from kernels.flashinfer.flashinfer_attention import FlashInferAttention
from kernels.flashinfer.flashinfer_graph import FlashInferGraphAttention
from kernels.flashinfer.flashinfer_workspace import make_workspace
from kernels.gpu.cuda_graphs import CudaGraphs
from kernels.gpu.merge import merge_prefixes

CUDA = torch.device("cuda")
LIBRARIES = ["triton", "flashinfer"]
SHAPES = [(32, 8, 128), (32, 32, 128), (9, 3, 64)]
PREFIXES = [SharedPrefix((0, 2, 5), 100), SharedPrefix((1, 3), 7)]
ROWS = [
    ([1] * 7, [3000, 150, 1601, 900, 64, 2500, 700]),  # decode
    ([5, 1, 3, 5, 2, 4, 1], [3000, 150, 1604, 900, 64, 2500, 700]),  # verify
    ([700, 1, 5, 100, 1, 1, 40], [2400, 150, 1605, 300, 64, 2500, 700]),  # chunks of prompts in the same batch
]


def layer_of(kv_heads: int, head_dim: int) -> LayerKV:
    k, v = torch.randn(2, 300, kv_heads, 16, head_dim, device=CUDA).bfloat16()
    return LayerKV(k, v)


def pages_of(prefixes: list[SharedPrefix]) -> Tensor:
    pages = torch.randint(300, (7, 256), device=CUDA)
    for prefix in prefixes:
        pages[list(prefix.rows), : prefix.pages] = pages[prefix.rows[0], : prefix.pages].clone()
    return pages


def need(library: str) -> None:
    if library == "flashinfer":
        pytest.importorskip("flashinfer", reason="FlashInfer is not installed: pip install 'magicdec[cuda]'")


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), SHAPES)
def test_eager(monkeypatch: pytest.MonkeyPatch, library: str, heads: int, kv_heads: int, head_dim: int) -> None:
    need(library)
    always_share(monkeypatch)
    torch.manual_seed(0)
    layer = layer_of(kv_heads, head_dim)
    ours = GpuAttention() if library == "triton" else FlashInferAttention(16, make_workspace(CUDA), merge_prefixes)
    for queries, lengths in ROWS:
        batch = AttentionBatch(queries, lengths, pages_of(PREFIXES), prefixes=PREFIXES)
        ours.plan(batch)
        q = torch.randn(sum(queries), heads, head_dim, device=CUDA).bfloat16()
        check_against_reference(ours.run(layer, q, head_dim**-0.5), batch, layer, q, head_dim**-0.5)


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), SHAPES)
def test_captured(library: str, heads: int, kv_heads: int, head_dim: int, queries: int) -> None:
    """Replays follow the prefixes of their plan: two, one, none; rows with fewer queries are padded in front."""
    need(library)
    torch.manual_seed(0)
    layer = layer_of(kv_heads, head_dim)
    batch = GraphBatch(queries, pages_of([]), torch.ones(7, dtype=torch.int64, device=CUDA), prefixes=3)
    ours: GraphAttention = GpuPrefixGraphAttention(batch)
    if library == "flashinfer":
        ours = FlashInferGraphAttention(16, make_workspace(CUDA), batch, merge_prefixes)
    q = torch.randn(7 * queries, heads, head_dim, device=CUDA).bfloat16()
    held: dict[str, tuple[Tensor, Tensor]] = {}

    def work() -> None:
        held["result"] = ours.run(layer, q, 0.1)

    ours.plan([1] * 7)
    replay = CudaGraphs(CUDA).capture(work)
    counts = [min(queries, each) for each in (5, 1, 3, 5, 2, 4, 1)]
    real = torch.tensor([i >= queries - n for n in counts for i in range(queries)], device=CUDA)
    for prefixes, lengths in (
        (PREFIXES, ROWS[1][1]),
        (PREFIXES[1:], [7, 130, 17, 4000, 64, 9, 2000]),
        ([], [7, 30, 17, 40, 4000, 9, 2000]),
        ([SharedPrefix(tuple(range(7)), 30)], [600] * 7),
    ):
        batch.pages.copy_(pages_of(prefixes))
        batch.lengths.copy_(torch.tensor(lengths))
        ours.plan(lengths, prefixes)
        replay()
        drawn = AttentionBatch(counts, lengths, batch.pages)
        out, lse = held["result"]
        check_against_reference((out[real], lse[real]), drawn, layer, q[real], 0.1)
