"""Compare the CPU kernels with the memory bandwidth of the machine and with torch's kernels.

    python -m bench.micro.cpu_kernels --threads 2

Attention cycles through the layers of a KV pool larger than the CPU caches. Matrix products read the weights of a
30-layer model. Data are random, in the default model's shapes: 9 query heads and 3 KV heads of dimension 64, hidden
size 576.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from itertools import cycle
from statistics import median

import torch
import torch.nn.functional as F

from bench.micro.bandwidth import read_bandwidth
from kernels.attention.base import AttentionBatch
from kernels.attention.cpu_attention import CpuAttention
from kernels.cpu.library import CpuKernels, PackedWeights
from kernels.kv_cache import KVPool
from models.default import user_cache

_HEADS, _KV_HEADS, _HEAD_DIM, _PAGE = 9, 3, 64, 16
_SHAPES = ((576, 960), (576, 576), (576, 3072), (1536, 576))
_LAYERS = 30
_POOL_BYTES = 400e6


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Return the median seconds of a run, after one warm-up."""
    run()
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        taken.append(time.perf_counter() - began)
    return median(taken)


def attention(kernels: CpuKernels, rows: int, context: int, ceiling: float) -> None:
    """Measure one layer's attention over `rows` rows, by queries per row. ceiling: bytes per second of a read."""
    width = -(-context // _PAGE)
    read = 2 * rows * context * _KV_HEADS * _HEAD_DIM * 2
    pool = KVPool(
        num_layers=max(2, int(_POOL_BYTES / read)),
        num_pages=rows * width,
        page_size=_PAGE,
        kv_heads=_KV_HEADS,
        head_dim=_HEAD_DIM,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    pool.data.normal_()
    pages = torch.arange(rows * width).view(rows, width)
    backend, first = CpuAttention(kernels), 0.0
    for queries in (1, 2, 4, 7):
        q = torch.randn(rows * queries, _HEADS, _HEAD_DIM, dtype=torch.bfloat16)
        backend.plan(AttentionBatch([queries] * rows, [context] * rows, pages))
        layers = cycle(pool.layer(index) for index in range(len(pool.data)))
        taken = seconds(lambda q=q, layers=layers: backend.run(next(layers), q, 0.125), 60)  # type: ignore[misc]
        first = first or taken
        print(
            f"attention {rows:3} x {context:5}, {queries} queries: {1e3 * taken:.2f} ms, {read / taken / 1e9:.1f} GB/s,"
            f" {read / taken / ceiling:.0%} of a read, {taken / first:.2f} x one query"
        )


def products(kernels: CpuKernels, rows: int) -> None:
    """Measure the matrix products of all layers, by weight format."""
    weights = [[torch.randn(n, k, dtype=torch.bfloat16) for k, n in _SHAPES] for _ in range(_LAYERS)]
    packed = [[PackedWeights(weight) for weight in layer] for layer in weights]
    coarse = [[PackedWeights(weight).quantized() for weight in layer] for layer in weights]
    xs = [torch.randn(rows, k, dtype=torch.bfloat16) for k, _ in _SHAPES]
    size = sum(weight.nbytes for layer in weights for weight in layer)

    def own(layers: list[list[PackedWeights]]) -> None:
        for layer in layers:
            for x, weight in zip(xs, layer, strict=True):
                kernels.linear(x, weight)

    def torchs() -> None:
        for layer in weights:
            for x, weight in zip(xs, layer, strict=True):
                F.linear(x, weight)

    bf16, int8, theirs = seconds(lambda: own(packed), 5), seconds(lambda: own(coarse), 5), seconds(torchs, 5)
    print(
        f"products of {rows:3} rows: bf16 {1e3 * bf16:6.1f} ms ({size / bf16 / 1e9:4.1f} GB/s,"
        f"{size * rows / bf16 / 1e9:4.0f} GFLOP/s), int8 {1e3 * int8:6.1f} ms; torch bf16 {1e3 * theirs:6.1f} ms, "
        f"{theirs / bf16:.2f} x ours"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    threads = parser.parse_args().threads
    torch.set_num_threads(threads)
    kernels = CpuKernels(user_cache() / "kernels")
    ceiling = read_bandwidth(torch.device("cpu"))
    print(f"{kernels.name}, {threads} threads, sequential read {ceiling / 1e9:.1f} GB/s")
    for rows, context in ((1, 2048), (8, 8192), (16, 7500), (16, 512)):
        attention(kernels, rows, context, ceiling)
    for rows in (1, 4, 16, 64, 256, 512):
        products(kernels, rows)


if __name__ == "__main__":
    main()
