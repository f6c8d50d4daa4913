"""Compare the CPU kernels with the memory bandwidth of the machine and with torch's kernels.

    python -m bench.micro.cpu_kernels --threads 2 [--set avx2]

The kernels are those that are chosen for this processor, or those of one of its instruction sets. Attention cycles
through the layers of a KV pool larger than the CPU caches, by rows with pages of their own and by rows that list the
same pages, which it reads once; then sealed pages beside dense ones. Matrix products read the weights of a 30-layer
model. Data are random, in the default model's shapes: 9 query heads and 3 KV heads of dimension 64, hidden size 576.
Votes are those of two queries per row, per page and per slot; choosing the best of them is compared with torch's topk.

The last lines say whether the bits of a row's product in torch depend on the number of rows, and whether they are ours.
A row's result must be the same beside any others: torch could multiply many rows only if it also multiplied single
ones, or had the bits of our product of one. In parentheses: share of numbers that differ.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.machine import describe_processor
from bench.micro.bandwidth import read_bandwidth
from kernels.attention.base import AttentionBatch, Ballot
from kernels.attention.cpu_attention import CpuAttention
from kernels.cpu.choice import KernelChoice
from kernels.cpu.compiler import InstructionSet, KernelsUnavailable, supported
from kernels.cpu.library import READABLE_KV, CpuKernels
from kernels.cpu.micro_profile import choose
from kernels.cpu.packing import Packed, PackedWeights, pack
from kernels.kv.kv_bits import KV_BITS, SEALED_GROUP
from kernels.kv.kv_formats import KV_FORMATS
from kernels.kv.kv_pool import KVPool, LayerKV
from kernels.weights.weight_format import FORMATS
from models.default import user_cache

_HEADS, _KV_HEADS, _HEAD_DIM, _PAGE = 9, 3, 64, 16
SHAPES = ((576, 960), (576, 576), (576, 3072), (1536, 576))
"""Input and output features of a layer's products."""
_LAYERS = 30
_POOL_BYTES = 400e6
_EXACT_PAGES = 16
_DECODING = ((1, 2048), (8, 8192), (16, 7500), (16, 512))
"""Rows and context of attention while decoding."""
_CHUNK = (1, 4096, 512)
"""Rows, context and queries per row of attention in a chunk of a prompt."""
_SHARED = (16, 6144)
"""Rows and context of attention while decoding, of rows that list the same pages."""
_SEALED = ((4, 7500), (16, 7500))
"""Rows and context of attention over sealed pages."""
_VOTES = (16, 7500)
"""Rows and context of attention whose queries vote."""
_ROWS = (1, 2, 4, 8, 16, 64, 256, 512)
"""Row counts of products."""


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Return the median seconds of a run, after one warm-up."""
    run()
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        taken.append(time.perf_counter() - began)
    return median(taken)


def attention(kernels: CpuKernels, rows: int, context: int, queries: Sequence[int], ceiling: float) -> None:
    """Measure one layer's attention over `rows` rows, by queries per row. ceiling: bytes per second of a read."""
    read = kv_bytes(rows, context)
    layers_of, pages = _pool(rows, context)
    backend, first = CpuAttention(kernels), 0.0
    for count in queries:
        q = torch.randn(rows * count, _HEADS, _HEAD_DIM, dtype=torch.bfloat16)
        backend.plan(AttentionBatch([count] * rows, [context] * rows, pages))
        layers = cycle(layers_of)
        repeats = 60 if count <= 16 else 10
        taken = seconds(lambda q=q, layers=layers: backend.run(next(layers), q, 0.125), repeats)  # type: ignore[misc]
        first = first or taken
        line = f"attention {rows:3} x {context:5}, {count:3} queries: {1e3 * taken:7.2f} ms, "
        if count <= 16:
            line += f"{read / taken / 1e9:.1f} GB/s, {read / taken / ceiling:.0%} of a read"
        else:
            line += f"{attention_flops(rows, context, count) / taken / 1e9:.0f} GFLOP/s"
        print(f"{line}, {taken / first:.2f} x one query" if len(queries) > 1 else line)


def shared_pages(kernels: CpuKernels, rows: int, context: int, queries: Sequence[int], ceiling: float) -> None:
    """Measure one layer's attention over rows with pages of their own, and over rows that list the same pages, by
    queries per row. ceiling: bytes per second of a read."""
    layers, pages = _pool(rows, context)
    for count in queries:
        q = torch.randn(rows * count, _HEADS, _HEAD_DIM, dtype=torch.bfloat16)
        own = 0.0
        # Lists of the same pages are those of one row after the other, so that caches do not hold them.
        for name, lists, read in (("own", [pages], rows), ("the same", [page.repeat(rows, 1) for page in pages], 1)):
            planned = []
            for each in lists:
                planned.append(CpuAttention(kernels))
                planned[-1].plan(AttentionBatch([count] * rows, [context] * rows, each))
            turns = cycle([(backend, layer) for backend in planned for layer in layers])

            def run(turns: Iterator[tuple[CpuAttention, LayerKV]] = turns, q: Tensor = q) -> None:
                backend, layer = next(turns)
                backend.run(layer, q, 0.125)

            taken = seconds(run, 40)
            own = own or taken
            speed = kv_bytes(read, context) / taken
            print(
                f"attention {rows:3} x {context:5}, {count:3} queries, {name:>8} pages: {1e3 * taken:7.2f} ms, "
                f"{speed / 1e9:.1f} GB/s, {speed / ceiling:.0%} of a read, "
                f"{attention_flops(rows, context, count) / taken / 1e9:.0f} GFLOP/s, {taken / own:.2f} x own pages"
            )


def votes(kernels: CpuKernels, rows: int, context: int, queries: Sequence[int]) -> None:
    """Measure what votes add to attention, by turns, and how long it takes to choose the best of them."""
    layers_of, pages = _pool(rows, context)
    layers, units = cycle(layers_of), {"page": _PAGE, "slot": 1}
    for count in queries:
        q = torch.randn(rows * count, _HEADS, _HEAD_DIM, dtype=torch.bfloat16)
        ballots: dict[str, Ballot | None] = {"none": None}
        for name, unit in units.items():
            counted = torch.empty(rows, _KV_HEADS, pages.shape[1] * _PAGE // unit)
            ballots[name] = Ballot(torch.tensor([[0, count - 1]] * rows), unit, counted)
        taken: dict[str, list[float]] = {name: [] for name in ballots}
        for _ in range(60):
            for name, ballot in ballots.items():
                backend = CpuAttention(kernels)
                backend.plan(AttentionBatch([count] * rows, [context] * rows, pages, ballot=ballot))
                taken[name].append(seconds(lambda b=backend, q=q: b.run(next(layers), q, 0.125), 1))  # type: ignore[misc]
        plain = median(taken["none"])
        added = ", ".join(f"{median(taken[name]) / plain - 1:+.1%} per {name}" for name in units)
        print(f"votes {rows:5} x {context:5}, {count:3} queries: {1e3 * plain:7.2f} ms without, {added}")
    for name, unit in units.items():
        counted = torch.rand(rows * _KV_HEADS, context // unit)
        best = counted.shape[1] // 15
        ours, theirs = seconds(lambda: kernels.best(counted, best), 20), seconds(lambda: counted.topk(best), 20)  # noqa: B023
        print(f"best {best} of {tuple(counted.shape)}, per {name}: {1e6 * ours:.0f} µs, topk {1e6 * theirs:.0f} µs")


def sealed_pages(kernels: CpuKernels, rows: int, context: int, queries: Sequence[int], ceiling: float) -> None:
    """Measure one layer's attention over dense pages and over sealed ones, as the target and as drafts read them, by
    turns. ceiling: bytes per second of a read."""
    formats = [(name, False) for name in KV_BITS if name in READABLE_KV]
    formats += [(name, True) for name, _ in formats if KV_BITS[name].draft_bits is not None]
    for dtype in (torch.float32, torch.bfloat16):
        pools = {each: _pool_of(*each, rows, context, dtype) for each in formats}
        for count in queries:
            q = torch.randn(rows * count, _HEADS, _HEAD_DIM, dtype=dtype)
            turns = {each: cycle(layers) for each, (layers, _, _) in pools.items()}
            taken: dict[tuple[str, bool], list[float]] = {each: [] for each in formats}
            for _ in range(30):
                for each in formats:
                    backend = CpuAttention(kernels)
                    backend.plan(AttentionBatch([count] * rows, [context] * rows, pools[each][1]))
                    began = time.perf_counter()
                    backend.run(next(turns[each]), q, 0.125)
                    taken[each].append(time.perf_counter() - began)
            cells = []
            for each in formats:
                middle = median(taken[each][2:])
                speed = pools[each][2] / middle
                name = f"{each[0]} drafts" if each[1] else each[0]
                cells.append(f"{name} {1e6 * middle:.0f} µs, {speed / 1e9:.1f} GB/s, {speed / ceiling:.0%} of a read")
            print(f"sealed {rows:3} x {context:5}, {count} queries, {str(dtype)[6:]}: {'; '.join(cells)}")


def _pool_of(name: str, drafts: bool, rows: int, context: int, dtype: torch.dtype) -> tuple[list[LayerKV], Tensor, int]:
    """Return the layers of a pool larger than the CPU caches, lists of its pages, one for each row, and the bytes that
    attention reads of a layer. Sealed pages hold copies of a few."""
    width, bits = -(-context // SEALED_GROUP), KV_BITS[name]
    pages = torch.arange(rows * width).view(rows, width)
    tokens = pages.numel() * _KV_HEADS * SEALED_GROUP
    stored, read = (tokens * bits.token_bytes(_HEAD_DIM, dtype.itemsize, drafts=each) for each in (False, drafts))
    pool = KV_FORMATS[name].make_pool(
        _EXACT_PAGES if bits.seals else 0,
        num_layers=max(2, int(_POOL_BYTES / stored)),
        num_pages=pages.numel(),
        page_size=SEALED_GROUP,
        kv_heads=_KV_HEADS,
        head_dim=_HEAD_DIM,
        dtype=dtype,
        device=torch.device("cpu"),
        scratch=False,
    )
    pool.fill_random()
    view = pool.drafting() if drafts else pool
    return [view.layer(index) for index in range(pool.num_layers)], pages, read


def kv_bytes(rows: int, context: int) -> int:
    """Count the bytes of one layer's keys and values."""
    return 2 * rows * context * _KV_HEADS * _HEAD_DIM * 2


def _pool(rows: int, context: int) -> tuple[list[LayerKV], Tensor]:
    """Return the layers of a pool larger than the CPU caches, and lists of its pages, one for each row."""
    width = -(-context // _PAGE)
    pool = KVPool(
        num_layers=max(2, int(_POOL_BYTES / kv_bytes(rows, context))),
        num_pages=rows * width,
        page_size=_PAGE,
        kv_heads=_KV_HEADS,
        head_dim=_HEAD_DIM,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    pool.fill_random()
    return [pool.layer(index) for index in range(pool.num_layers)], torch.arange(rows * width).view(rows, width)


def attention_flops(rows: int, context: int, queries: int, *, heads: int = _HEADS, head_dim: int = _HEAD_DIM) -> float:
    """Count the floating-point operations of one layer's attention of the last `queries` tokens of each row."""
    return 4 * rows * queries * (context - (queries - 1) / 2) * heads * head_dim


def products(kernels: CpuKernels, row_counts: Sequence[int], ceiling: float) -> None:
    """Measure the matrix products of all layers, by number of rows and weight format. ceiling: bytes per second of a
    read."""
    weights = [[torch.randn(n, k, dtype=torch.bfloat16) for k, n in SHAPES] for _ in range(_LAYERS)]
    packed = {
        name: [[pack(FORMATS[format_name].quantize(weight)) for weight in layer] for layer in weights]
        for name, format_name in (("bf16", "dense"), ("int8", "int8"), ("fp8", "fp8"), ("int4", "int4"))
    }
    sizes = {name: sum(each.nbytes for layer in layers for each in layer) for name, layers in packed.items()}
    numbers = sum(weight.numel() for layer in weights for weight in layer)

    def own(inputs: list[Tensor], layers: Sequence[Sequence[Packed]]) -> None:
        for layer in layers:
            for x, weight in zip(inputs, layer, strict=True):
                kernels.linear(x, weight)

    def torchs(inputs: list[Tensor]) -> None:
        for layer in weights:
            for x, weight in zip(inputs, layer, strict=True):
                F.linear(x, weight)

    heads = "".join(f"   {name} ms    GB/s of read GFLOP/s" for name in packed)
    print(f"products  {heads}  torch bf16 ms GFLOP/s  torch / ours")
    for rows in row_counts:
        xs = [torch.randn(rows, k, dtype=torch.bfloat16) for k, _ in SHAPES]
        flops = 2 * rows * numbers
        taken = {name: seconds(partial(own, xs, layers), 5) for name, layers in packed.items()}
        cells = "".join(_cells(each, sizes[name], flops, ceiling) for name, each in taken.items())
        theirs = seconds(partial(torchs, xs), 5)
        print(
            f"{rows:4} rows {cells} {1e3 * theirs:14.1f} {flops / theirs / 1e9:7.0f} {theirs / taken['bf16']:13.2f}",
        )


def _cells(taken: float, size: int, flops: int, ceiling: float) -> str:
    speed = size / taken
    return f"{1e3 * taken:10.1f} {speed / 1e9:7.1f} {speed / ceiling:7.0%} {flops / taken / 1e9:7.0f}"


def compare_bits(kernels: CpuKernels, row_counts: Sequence[int]) -> None:
    """Compare the bits of rows' products in torch and ours, by number of rows."""
    for features, size in SHAPES:
        weight = torch.randn(size, features, dtype=torch.bfloat16)
        x, packed = torch.randn(max(row_counts), features, dtype=torch.bfloat16), PackedWeights(weight)
        theirs = torch.cat([F.linear(x[row : row + 1], weight) for row in range(len(x))])
        ours = torch.cat([kernels.linear(x[row : row + 1], packed) for row in range(len(x))])
        kinds = {
            "torch, one row and several": [_differ(F.linear(x[:rows], weight), theirs) for rows in row_counts],
            "torch and ours": [_differ(F.linear(x[:rows], weight), ours) for rows in row_counts],
            "ours, one row and several": [_differ(kernels.linear(x[:rows], packed), ours) for rows in row_counts],
        }
        for name, shares in kinds.items():
            differ = [f"{rows} ({share:.2%})" for rows, share in zip(row_counts, shares, strict=True) if share]
            what = f"differ at rows: {', '.join(differ)}" if differ else "are the same"
            print(f"bits of {features:4} x {size:4}, {name}: {what}")


def _differ(some: Tensor, alone: Tensor) -> float:
    """Return the share of numbers that differ from those of rows computed alone."""
    return (some != alone[: len(some)]).float().mean().item()


def open_kernels(folder: Path, name: str | None) -> tuple[CpuKernels, KernelChoice]:
    """Return kernels of the set `name`; None: of the chosen sets. Raises KernelsUnavailable."""
    if name is None:
        choice = choose(folder)
    else:
        sets = {target.name: target for target in supported()}
        if name not in sets:
            raise KernelsUnavailable(f"this processor has no {name!r}; it has: {', '.join(sets)}")
        choice = KernelChoice.all_of(sets[name])
    return CpuKernels(folder, choice), choice


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--set", help=f"instruction set: {', '.join(target.name for target in supported())}")
    parser.add_argument("--products", action="store_true", help="measure products alone")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    try:
        kernels, choice = open_kernels(user_cache() / "kernels", given.set)
    except (KernelsUnavailable, OSError) as error:
        sys.exit(f"error: {error}")
    ceiling = read_bandwidth(torch.device("cpu"))
    print(f"{describe_processor()}, {given.threads} threads, sequential read {ceiling / 1e9:.1f} GB/s")
    print(
        f"{'chosen' if given.set is None else 'given'}: attention {choice.attention.name} ({choice.prefetch}), "
        f"products {_product_set(choice.products, choice.tiles_from)}, "
        f"int8 products {_product_set(choice.products_int8, choice.tiles_from_int8)}, "
        f"int4 products {choice.products_int4.name}, the rest {choice.rest.name}"
    )
    if not given.products:
        for rows, context in _DECODING:
            attention(kernels, rows, context, (1, 2, 4, 7), ceiling)
        shared_pages(kernels, *_SHARED, (1, 4), ceiling)
        for rows, context in _SEALED:
            sealed_pages(kernels, rows, context, (1, 4), ceiling)
        votes(kernels, *_VOTES, (4, 7, 9))
        attention(kernels, *_CHUNK[:2], _CHUNK[2:], ceiling)
    products(kernels, _ROWS, ceiling)
    compare_bits(kernels, _ROWS)


def _product_set(target: InstructionSet, tiles_from: int) -> str:
    return f"{target.name} (tiles from {tiles_from} rows)" if target.has_tiles else target.name


if __name__ == "__main__":
    main()
