"""Tiles of queries and of keys: their sizes, and their products, shared by several kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

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


def tile_shape(queries: int, head_dim: int, dtype: torch.dtype) -> TileShape:
    """Choose tiles whose registers and shared memory an A100 has, for any model.

    queries: number of queries, of all heads of a KV head, that belong together; more than m are cut into several
    programs. m is at most 64. m and n are 16 in float32, which GPUs multiply outside tensor cores, with both tiles in
    registers.

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
    m = 16 if wide else min(max(16, min(64, _SUMS // d)), max(16, triton.next_power_of_2(queries)))
    n = 16 if wide else max(16, min(64, _KEY_BYTES // (d * dtype.itemsize)))
    # At most 32 sums and 16 scores per thread at 4 warps, or else 8 warps. Registers are limited to those of three
    # small programs per multiprocessor, or else only by the device: left alone, the compiler spills some of them to
    # make room for yet another program, for which there is no shared memory.
    warps = 4 if m < 64 and m * d * dtype.itemsize <= 8192 else 8
    return TileShape(m, n, d, warps, registers=168 if m == 16 and not wide else 255)


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
