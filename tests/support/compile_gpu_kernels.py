"""Compile every Triton kernel for a GPU that need not be present, in the shapes of real models.

    python -m tests.support.compile_gpu_kernels ARCHITECTURE [few | tall]

ARCHITECTURE: 80 for an A100, 90 for an H100. few: every kernel, in few shapes. tall: kernels whose products an H100
computes in another way than an A100, and decoding. Kernel launchers run on CPU tensors; instead of launching,
Triton compiles to the GPU's machine code. Prints each binary's `Resources`, a JSON object per line.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch

from kernels.attention.base import AttentionBatch, Ballot, SharedPrefix
from kernels.attention.triton_attention import GpuAttention
from kernels.gpu import merge, pointwise, sample, snapkv_scores, verdict, votes
from kernels.gpu.products.dense_grouped import GroupedDense
from kernels.gpu.products.few_bit_grouped import GroupedFewBit
from kernels.gpu.products.few_bit_layout import lay_out
from kernels.gpu.products.few_bit_products import few_bit_product
from kernels.gpu.products.fp8_products import round_inputs
from kernels.gpu.products.sorted_pairs import SortedPairs, sort_pairs
from kernels.kv.kv_bits import SEALED_GROUP
from kernels.kv.kv_pool import LayerKV
from kernels.ops import Gate
from kernels.weights.matrix import QuantizedMatrix, regular_groups
from tests.support.gates import GATES
from tests.support.gpu_compiler import Compiler
from tests.support.kv_layers import KINDS, draw_sinks, layer_of

HEADS = (
    (32, 8, 128),
    (32, 32, 128),
    (64, 8, 128),
    (4, 1, 128),
    (8, 1, 128),
    (16, 8, 256),
    (8, 1, 256),
    (16, 1, 256),
    (71, 1, 64),
    (9, 3, 64),
    (1, 1, 80),
)
"""Query heads, KV heads and head_dim, of whole models and of ranks' shards."""
SHARED = 1 << 20
"""Pages of a prefix: so many that reading it once pays for every model."""


def attention(
    compiler: Compiler,
    heads: tuple[int, int, int],
    dtype: torch.dtype,
    queries: int,
    width: int,
    shared: int = 0,
    unit: int = 0,
    kind: str = "dense",
    window: int = 0,
    sinks: bool = False,
) -> None:
    """width: pages per list; long lists are split most. shared: first pages that the rows share. unit: slots that share
    a vote; 0: there are none. kind: see LayerKV.kind. window: see AttentionBatch."""
    q_heads, kv_heads, head_dim = heads
    compiler.case = f"{q_heads}/{kv_heads}/{head_dim} {str(dtype)[6:]}, {queries} queries, {width} pages"
    compiler.case += "" if kind == "dense" else f", {kind} KV"
    compiler.case += f", a window of {window}" if window else ""
    compiler.case += ", sinks" if sinks else ""
    compiler.case += f", {shared} shared" if shared else f", a vote per {unit}" if unit else ""
    page = SEALED_GROUP if kind in ("int8", "int4x2", "upper") else 16
    k, v = torch.zeros(2, 9, kv_heads, page, head_dim, dtype=dtype)
    layer = layer_of(kind, k, v, num_sealed=3)
    if sinks:
        layer = draw_sinks(layer, q_heads)
    backend = GpuAttention()
    prefixes = [SharedPrefix((0, 1), shared)] if shared else []
    lengths = [900 + page * shared] * 2
    lists = torch.zeros(2, width + shared, dtype=torch.int64)
    ballot = ballot_of(kv_heads, page * width, unit) if unit else None
    backend.plan(AttentionBatch([queries] * 2, lengths, lists, prefixes=prefixes, ballot=ballot, window=window))
    backend.run(layer, torch.zeros(2 * queries, q_heads, head_dim, dtype=dtype), 0.1)


def ballot_of(kv_heads: int, slots: int, unit: int) -> Ballot:
    return Ballot(torch.zeros(2, 2, dtype=torch.int64), unit, torch.zeros(2, kv_heads, slots // unit))


def counting(
    compiler: Compiler, heads: tuple[int, int, int], dtype: torch.dtype, unit: int, kind: str = "dense"
) -> None:
    """A pass over keys for votes alone."""
    q_heads, kv_heads, head_dim = heads
    compiler.case = f"{q_heads}/{kv_heads}/{head_dim} {str(dtype)[6:]}, votes alone, per {unit}, {kind} KV"
    k, v = torch.zeros(2, 9, kv_heads, SEALED_GROUP, head_dim, dtype=dtype)
    layer = layer_of(kind, k, v, num_sealed=3)
    index, lists = torch.zeros(2, dtype=torch.int64), torch.zeros(2, 64, dtype=torch.int64)
    q, lse = torch.zeros(2, q_heads, head_dim, dtype=dtype), torch.zeros(2, q_heads)
    ballot = ballot_of(kv_heads, SEALED_GROUP * 64, unit)
    votes.count_votes(ballot, votes.VotingRows(index, index, index), lists, layer, q, 0.1, lse)


def merging(compiler: Compiler, heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    q_heads, kv_heads, head_dim = heads
    compiler.case = f"{q_heads}/{kv_heads}/{head_dim} {str(dtype)[6:]}"
    out, lse, places = torch.zeros(2, q_heads, head_dim, dtype=dtype), torch.zeros(2, q_heads), torch.zeros(2).long()
    merge.merge_prefixes(out, lse, places, out.clone(), lse.clone())


def snapkv(compiler: Compiler, heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    q_heads, kv_heads, head_dim = heads
    compiler.case = f"{q_heads}/{kv_heads}/{head_dim} {str(dtype)[6:]}"
    q, k = (torch.zeros(n, h, head_dim, dtype=dtype) for n, h in ((32, q_heads), (9000, kv_heads)))
    snapkv_scores.snapkv_scores(q, k.transpose(0, 1), 0.1, candidates=8000, kernel=5)


def layer_kernels(compiler: Compiler, heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    q_heads, kv_heads, head_dim = heads
    compiler.case = f"{q_heads}/{kv_heads}/{head_dim} {str(dtype)[6:]}"
    x = torch.zeros(2, q_heads * head_dim, dtype=dtype)
    pointwise.norm(x, x.clone(), x[0], 1e-5)
    pointwise.norm(x, None, x[0], 1e-5)
    for gate in GATES:
        pointwise.apply_gate(x, gate)
    layer = LayerKV(*torch.zeros(2, 9, kv_heads, 16, head_dim, dtype=dtype))
    qkv = torch.zeros(2, q_heads + 2 * kv_heads, head_dim, dtype=dtype)
    table = torch.zeros(9, head_dim // 2)
    index = torch.zeros(2, dtype=torch.int64)
    norms = torch.ones(head_dim, dtype=dtype), torch.ones(head_dim, dtype=dtype), 1e-5
    for each in (None, norms):
        pointwise.rotary(qkv, table, table, index, index, layer, each)
    pointwise.rotary(qkv, table, table, index, index, layer_of("fp8", layer.k, layer.v), norms)


def wide_norm(compiler: Compiler, size: int) -> None:
    compiler.case = f"{size} features"
    x = torch.zeros(2, size, dtype=torch.bfloat16)
    pointwise.norm(x, x.clone(), x[0], 1e-5)


def sampling(compiler: Compiler, rows: int, size: int) -> None:
    compiler.case = f"{rows} rows, {size} tokens"
    index = torch.zeros(rows, dtype=torch.int64)
    sample.sample(torch.zeros(rows, size), torch.zeros(rows), index, index, 0)
    sample.noise_bits(index, index, 0, size)
    state = torch.zeros(rows, 64, dtype=torch.int32), index, torch.zeros(rows, 4, dtype=torch.int64)
    verdict.commit(*state, verdict.accept(*state, index, index, rows))


def few_bits(compiler: Compiler, format: str, group: int, mins: str, dtype: torch.dtype, rows: int) -> None:
    """group: features per group; 0: all. mins: none, zeros or any; see FewBitWeights."""
    columns, features = 256, 4096
    compiler.case = f"{format}, groups of {group}, mins: {mins}, {str(dtype)[6:]}, {rows} rows"
    matrix = zeros(format, group, mins, columns, features)
    few_bit_product(torch.zeros(rows, features, dtype=dtype), lay_out(matrix), torch.zeros(columns, dtype=dtype))


def zeros(format: str, group: int, mins: str, columns: int, features: int) -> QuantizedMatrix:
    codes = torch.zeros(columns, features, dtype={"int4": torch.uint8, "int8": torch.int8}.get(format, torch.uint8))
    groups = regular_groups(features, group or features)
    scales = torch.full((columns, int(groups[-1]) + 1), 0.5)
    offsets = {"zeros": -8 * scales, "any": 0.3 * scales}.get(mins)
    return QuantizedMatrix(
        format=format, codes=codes, scales=scales, mins=offsets, groups=groups, group_size=group or features
    )


def fp8_inputs(compiler: Compiler, features: int, dtype: torch.dtype) -> None:
    compiler.case = f"{features} features"
    round_inputs(torch.zeros(2, features, dtype=dtype))


EXPERTS, PER_TOKEN = 16, 8
WIDE, SIZE = 2048, 768
"""Features of inputs and of networks, in one of the shapes of mixtures of experts."""


def grouped(compiler: Compiler, dtype: torch.dtype, tokens: int, gate: Gate, *, biased: bool) -> None:
    """Grouped products of dense weights, which need no memory."""
    compiler.case = f"{str(dtype)[6:]}, {tokens} tokens, {gate}, biased: {biased}"
    gate_up, down = (
        GroupedDense(
            torch.empty(EXPERTS, columns, features, dtype=dtype),
            torch.empty(EXPERTS, columns, dtype=dtype) if biased else None,
            how,
        )
        for columns, features, how in ((2 * SIZE, WIDE, gate), (WIDE, SIZE, None))
    )
    pairs = sorted_pairs(tokens)
    down(gate_up(torch.zeros(tokens, WIDE, dtype=dtype), pairs), pairs)


def grouped_few_bits(
    compiler: Compiler, format: str, group: int, mins: str, dtype: torch.dtype, tokens: int, *, ordered: bool = False
) -> None:
    """ordered: whether features are not in the order of inputs. Others: see few_bits."""
    compiler.case = f"{format}, groups of {group}, mins: {mins}, ordered: {ordered}, {str(dtype)[6:]}, {tokens} tokens"
    pairs, x = sorted_pairs(tokens), torch.zeros(tokens, WIDE, dtype=dtype)
    gates: tuple[Gate | None, ...] = ("silu", None)
    for columns, features, gate in zip((2 * SIZE, WIDE), (WIDE, SIZE), gates, strict=True):
        matrix = zeros(format, group, mins, columns, features)
        if ordered:
            matrix = replace(matrix, groups=matrix.groups.flip(0))
        one = lay_out(matrix)
        stacked = {name: tensor.expand(EXPERTS, *tensor.shape) for name, tensor in one.tensors.items()}
        x = GroupedFewBit(one.with_tensors(stacked), torch.zeros(EXPERTS, columns, dtype=dtype), gate)(x, pairs)


def sorted_pairs(tokens: int) -> SortedPairs:
    return sort_pairs(torch.arange(PER_TOKEN).repeat(tokens, 1), torch.zeros(tokens, PER_TOKEN), EXPERTS)


FEW_BITS = (
    ("int4", 64, "zeros"),
    ("int4", 128, "none"),
    ("int4", 32, "any"),
    ("int8", 0, "none"),
    ("int8", 32, "none"),
    ("fp8", 0, "none"),
    ("fp8", 128, "none"),
)
"""Formats, features per group, and kinds of mins; see few_bits."""


def few(compiler: Compiler) -> None:
    """Every kernel, with each method of multiplication and kind of KV or weights once, most of them at their
    largest: dense KV in tall tiles, and dense experts and any mins in some, are left to `tall`."""
    attention(compiler, (32, 8, 128), torch.bfloat16, 1, 64)
    attention(compiler, (32, 8, 128), torch.bfloat16, 1, 64, SHARED, sinks=True)
    attention(compiler, (16, 8, 256), torch.float32, 1, 8192)
    attention(compiler, (32, 8, 128), torch.bfloat16, 1, 64, unit=16)
    counting(compiler, (8, 1, 256), torch.bfloat16, 16)
    attention(compiler, (64, 8, 128), torch.bfloat16, 40, 64, kind="fp8")
    attention(compiler, (64, 8, 128), torch.bfloat16, 40, 64, kind="int8", window=4096, sinks=True)
    attention(compiler, (8, 1, 256), torch.bfloat16, 40, 64, kind="int4x2")
    attention(compiler, (32, 8, 128), torch.bfloat16, 1, 64, kind="upper")
    merging(compiler, (8, 1, 256), torch.bfloat16)
    snapkv(compiler, (8, 1, 256), torch.bfloat16)
    layer_kernels(compiler, (32, 8, 128), torch.bfloat16)
    wide_norm(compiler, 32768)
    sampling(compiler, 2, 128_256)
    for format, group, mins, rows in (("int4", 64, "zeros", 1), ("int8", 0, "none", 40), ("fp8", 128, "none", 512)):
        few_bits(compiler, format, group, mins, torch.bfloat16, rows)
    fp8_inputs(compiler, 28_672, torch.bfloat16)
    grouped(compiler, torch.bfloat16, 40, "silu", biased=False)
    grouped_few_bits(compiler, "int4", 32, "zeros", torch.bfloat16, 300, ordered=True)
    grouped_few_bits(compiler, "int8", 32, "none", torch.bfloat16, 1)


def tall(compiler: Compiler) -> None:
    """Tiles of 64 rows and more, which an H100 multiplies by instructions of its own; and a batch that decodes, alone
    and behind a prefix."""
    attention(compiler, (32, 8, 128), torch.bfloat16, 1, 64)
    attention(compiler, (32, 8, 128), torch.bfloat16, 1, 64, SHARED)
    attention(compiler, (8, 1, 256), torch.bfloat16, 40, 64)
    grouped(compiler, torch.bfloat16, 300, "clamped_silu", biased=True)
    grouped_few_bits(compiler, "int4", 32, "any", torch.bfloat16, 300)


def everything(compiler: Compiler) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for heads in HEADS:
            for queries in (1, 4, 7, 40):
                for width in (64, 8192):
                    attention(compiler, heads, dtype, queries, width)
                attention(compiler, heads, dtype, queries, 64, SHARED)
                attention(compiler, heads, dtype, queries, 64, window=512)
                attention(compiler, heads, dtype, queries, 64, sinks=True)
                for unit in (16, 1):
                    attention(compiler, heads, dtype, queries, 64, unit=unit)
            for kind in KINDS if dtype != torch.float32 else ():  # in which some spill with a head_dim of 256
                for queries in (1, 4, 40):
                    attention(compiler, heads, dtype, queries, 64, kind=kind)
                    attention(compiler, heads, dtype, queries, 64, kind=kind, window=4096)
                    attention(compiler, heads, dtype, queries, 64, unit=16, kind=kind)
                attention(compiler, heads, dtype, 1, 64, SHARED, kind=kind)
                counting(compiler, heads, dtype, 16, kind)
            for unit in (16, 1):
                counting(compiler, heads, dtype, unit)
            merging(compiler, heads, dtype)
            snapkv(compiler, heads, dtype)
            layer_kernels(compiler, heads, dtype)
        for format, group, mins in FEW_BITS:
            for rows in (1, 20, 40, 512):
                few_bits(compiler, format, group, mins, dtype, rows)
        fp8_inputs(compiler, 28_672, dtype)
        for tokens in (1, 40, 300):
            for gate in GATES:
                grouped(compiler, dtype, tokens, gate, biased=gate == "clamped_silu")
            for format, group, mins in FEW_BITS:
                grouped_few_bits(compiler, format, group, mins, dtype, tokens)
                if mins != "any":  # layouts that reorder features have zero points, or none
                    grouped_few_bits(compiler, format, group, mins, dtype, tokens, ordered=True)
    for size in (5120, 8192, 16384, 32768):
        wide_norm(compiler, size)
    for rows, size in ((2, 128_256), (1, 100), (1, 1), (2, 262_144)):
        sampling(compiler, rows, size)


if __name__ == "__main__":
    cases = {"few": few, "tall": tall}.get(sys.argv[-1], everything)
    cases(Compiler(int(sys.argv[1])))
