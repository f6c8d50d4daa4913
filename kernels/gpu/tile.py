"""Tiles of queries and of keys: their sizes, loads and products, shared by several kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.kv.kv_pool import FP8, LayerKV

_KEY_BYTES = 16 * 1024  # of a tile of keys
_SUMS = 16 * 1024  # largest number of sums of a program, m × d


@dataclass(frozen=True, slots=True)
class TileShape:
    """Sizes of a program's tiles, powers of two: m queries, n keys, d elements of a head. warps: of the program.
    registers: largest number per thread."""

    m: int
    n: int
    d: int
    warps: int
    registers: int


def tile_shape(queries: int, head_dim: int, dtype: torch.dtype, kv: str = "dense") -> TileShape:
    """Choose tiles whose registers and shared memory an A100 has, for any model.

    queries: number of queries, of all heads of a KV head, that belong together; more than m are cut into several
    programs. m is at most 64. m and n are 16 in float32, which GPUs multiply outside tensor cores, with both tiles in
    registers. kv: see LayerKV.kind.

    Loads must keep the memory busy: full bandwidth takes bandwidth × latency bytes under way (Little's law). With 1 µs
    of latency under load, that is 2.0 TB/s / 108 = 19 KB for each multiprocessor of an A100, 3.35 TB/s / 132 = 25 KB of
    an H100, 4.8 TB/s / 132 = 36 KB of an H200. A program of attention has a tile of keys and one of values under way
    while it multiplies, 16 KiB each, and two of each afterwards. In a decode step two programs fit a multiprocessor (77
    KiB each at most, of 164), so that 64 KiB or more are under way; with a head_dim of 64, three with half of that
    each. Products do not hold them up: one real row of m = 16 costs as much as 16, 0.5 MFLOP for 32 KiB, which takes
    0.2 µs of an A100's tensor cores, about 500 instructions per warp take 0.4 µs, and loading takes 1.7 µs. By this
    estimate decoding reads about as fast as a copy does. It is not a measurement.
    """
    d = max(16, triton.next_power_of_2(head_dim))
    wide = dtype == torch.float32
    if kv != "dense":
        return _coded_tile_shape(queries, d, wide, kv)
    m = 16 if wide else min(max(16, min(64, _SUMS // d)), max(16, triton.next_power_of_2(queries)))
    n = 16 if wide else max(16, min(64, _KEY_BYTES // (d * dtype.itemsize)))
    # At most 32 sums and 16 scores per thread at 4 warps, or else 8 warps. Registers are limited to those of three
    # small programs per multiprocessor, or else only by the device: left alone, the compiler spills some of them to
    # make room for yet another program, for which there is no shared memory.
    warps = 4 if m < 64 and m * d * dtype.itemsize <= 8192 else 8
    return TileShape(m, n, d, warps, registers=168 if m == 16 and not wide else 255)


def _coded_tile_shape(queries: int, d: int, wide: bool, kv: str) -> TileShape:
    """Choose tiles of queries and of pages that have codes, converted in registers, which therefore hold fewer sums.

    Where pages are sealed, programs have room for tiles of both kinds, and use one of them: half as many keys leave two
    programs on a multiprocessor of an A100, with 32 KiB of codes of 8 bits, 16 KiB of those of 4, under way. float32
    with a head_dim of 256 spills some registers.
    """
    m = 16 if wide else min(max(16, min(64, _SUMS // 2 // d)), max(16, triton.next_power_of_2(queries)))
    most = 64 if kv == "fp8" and m == 16 else 32
    n = 16 if wide else max(16, min(most, _KEY_BYTES // (2 * d) if kv == "fp8" else _KEY_BYTES // (4 * d)))
    warps = 4 if m * d <= (1024 if wide else 4096) else 8
    return TileShape(m, n, d, warps, registers=255)


@triton.jit
def product(a: tl.tensor, b: tl.tensor, WIDEN: tl.constexpr) -> tl.tensor:
    """Multiply a [M, K] by b [K, N], with sums in float32. float32 inputs are not rounded to TF32.

    WIDEN: convert the inputs to float32 first, which does not change the result. Triton's interpreter needs it, because
    it multiplies the bit patterns of bfloat16.
    """
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def masked_scores(q: tl.tensor, k: tl.tensor, scale: tl.tensor, visible: tl.tensor, WIDEN: tl.constexpr) -> tl.tensor:
    """Compute q [M, D] times the transpose of k [N, D] times scale, -inf where `visible` [M, N] is false."""
    return tl.where(visible, product(q, tl.trans(k), WIDEN) * scale, float("-inf"))


# -- keys and values -------------------------------------------------------------------------------------------------


def kv_tensors(kv: LayerKV) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Return what `load_tile` reads of a layer: the exact pages of keys and of values, the records of both, and the
    number of sealed pages. Numbers of 8 bits are bytes: GPUs before 8.9 do not have them."""
    k, v = (part.view(torch.uint8) if part.dtype == FP8 else part for part in (kv.k, kv.v))
    sealed = kv.sealed
    return (k, v, k, v, 0) if sealed is None else (k, v, sealed.k, sealed.v, kv.num_sealed)


@triton.jit
def load_tile(
    exact: tl.tensor,
    records: tl.tensor,
    page: tl.tensor,
    at: tl.tensor,
    end: tl.tensor,
    head: tl.tensor,
    num_sealed: tl.tensor,
    page_stride: tl.tensor,
    KV: tl.constexpr,
    KEYS: tl.constexpr,
    DTYPE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
) -> tl.tensor:
    """Load the keys or values of a KV head in the slots at … at + N - 1 of a list: [N, D] of type DTYPE, 0 from slot
    `end` on. KEYS: whether they are keys. page: [N] int64, the listed pages of the slots, 0 from `end` on. KV: see
    LayerKV.kind.

    Where pages are sealed, a tile is part of one page. A masked load reads nothing, so only one of both kinds is read.
    """
    slot, d = at + tl.arange(0, N), tl.arange(0, D)
    listed, in_head = slot < end, d < HEAD_DIM
    inside = listed[:, None] & in_head[None, :]
    SEALED: tl.constexpr = KV != "dense" and KV != "fp8"
    if SEALED:
        is_exact = page >= num_sealed
        where = (page - num_sealed) * page_stride + (head * PAGE_SIZE + slot % PAGE_SIZE) * HEAD_DIM
        numbers = tl.load(exact + where[:, None] + d[None, :], mask=inside & is_exact[:, None], other=0.0)
        one = tl.max(page, 0)
        is_sealed = one < num_sealed
        codes_size: tl.constexpr = PAGE_SIZE * HEAD_DIM // (1 if KV == "int8" else 2)
        parameters: tl.constexpr = HEAD_DIM if KEYS else PAGE_SIZE  # of each kind
        record_size: tl.constexpr = PAGE_SIZE * HEAD_DIM + 4 * parameters
        record = records + (one * tl.num_programs(1) + head) * record_size
        inside = inside & is_sealed
        first = at % PAGE_SIZE
        if KV == "int8":
            steps = tl.load(record + (first + tl.arange(0, N))[:, None] * HEAD_DIM + d[None, :], mask=inside, other=0)
            steps = steps.to(tl.float32)
        else:
            steps = _load_nibbles(record, first, end - at, is_sealed, HEAD_DIM, N, D)
            if KV == "int4x2":
                lower = _load_nibbles(record + codes_size, first, end - at, is_sealed, HEAD_DIM, N, D)
                steps += (lower - 8.0) * 0.0625
        halves = record + PAGE_SIZE * HEAD_DIM
        if KEYS:
            scale = _load_halves(halves, 0, is_sealed, HEAD_DIM, D)[None, :]
            low = _load_halves(halves + 2 * parameters, 0, is_sealed, HEAD_DIM, D)[None, :]
        else:
            scale = _load_halves(halves, first, is_sealed, PAGE_SIZE, N)
            low = _load_halves(halves + 2 * parameters, first, is_sealed, PAGE_SIZE, N)
            scale, low = tl.where(listed, scale, 0.0)[:, None], tl.where(listed, low, 0.0)[:, None]
        tile = tl.where(is_sealed, (steps * scale + low).to(DTYPE), numbers)
    else:
        where = page * page_stride + (head * PAGE_SIZE + slot % PAGE_SIZE) * HEAD_DIM
        tile = tl.load(exact + where[:, None] + d[None, :], mask=inside, other=0.0)
        if KV == "fp8":
            tile = fp8_values(tile).to(DTYPE)
    return tile


@triton.jit
def _load_nibbles(
    codes: tl.tensor,
    first: tl.tensor,
    count: tl.tensor,
    is_sealed: tl.tensor,
    HEAD_DIM: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
) -> tl.tensor:
    """Load codes of 4 bits of the slots first … first + N - 1 of a page, of which `count` are listed: [N, D] float32.
    See kernels.kv.int4x2_kv."""
    pair, d = tl.arange(0, N // 2), tl.arange(0, D)
    inside = (is_sealed & (2 * pair < count))[:, None] & (d < HEAD_DIM)[None, :]
    both = tl.load(codes + (first // 2 + pair)[:, None] * HEAD_DIM + d[None, :], mask=inside, other=0)
    codes = tl.join((both & 15).to(tl.float32), (both >> 4).to(tl.float32))  # [N / 2, D, 2]
    return tl.reshape(tl.permute(codes, (0, 2, 1)), [N, D])


@triton.jit
def _load_halves(
    halves: tl.tensor, first: tl.tensor, is_sealed: tl.tensor, SIZE: tl.constexpr, COUNT: tl.constexpr
) -> tl.tensor:
    """Load COUNT of SIZE float16 numbers, 0 beyond these, as float32. They are loaded as 32-bit words, the least that
    is copied asynchronously."""
    word = first // 2 + tl.arange(0, COUNT // 2)
    words = tl.load(halves.to(tl.pointer_type(tl.int32)) + word, mask=is_sealed & (word < SIZE // 2), other=0)
    low, high = words.to(tl.int16).to(tl.float16, bitcast=True), (words >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return tl.interleave(low.to(tl.float32), high.to(tl.float32))


@triton.jit
def fp8_codes(value: tl.tensor) -> tl.tensor:
    """Round float32 to bytes of e4m3, to nearest, halves to even, and to its largest number where values exceed it. NaN
    remains NaN."""
    is_number = value == value
    value = tl.minimum(tl.maximum(value, -448.0), 448.0)
    bits = value.to(tl.int32, bitcast=True)
    low = bits & 0x7FFFFFFF
    # 3 bits of significand instead of 23, and 7 instead of 127 for an exponent of 0.
    normal = ((low + 0x7FFFF + ((low >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 codes count 2^-9; adding 2^23 to so few rounds them.
    subnormal = ((tl.abs(value) * 512.0 + 8388608.0) - 8388608.0).to(tl.int32)
    code = tl.where(low < (121 << 23), subnormal, normal) | ((bits >> 24) & 0x80)
    return tl.where(is_number, code, 0x7F).to(tl.uint8)


@triton.jit
def fp8_values(codes: tl.tensor) -> tl.tensor:
    """Convert bytes of e4m3 to float32. As float16 they have a smaller exponent, subnormal numbers too."""
    low = (codes & 0x7F).to(tl.int16)
    bits = (codes & 0x80).to(tl.int16) << 8 | low << 7
    value = bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where(low == 0x7F, float("nan"), value)
