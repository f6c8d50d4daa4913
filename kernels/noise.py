"""Counter-based Gumbel noise: a pure function of (seed, position, token id).

There is no generator state, so the noise of a token is the same on every rank and in every batch. A draft and its
target can therefore draw with common random numbers, and each of N ranks can add its own slice. The integers are
identical on every device; their logarithms may differ between devices in the last bit.

Integers: the SplitMix64 finaliser (Steele, Lea & Flood, 2014) mixes a row's (seed, position) to a 64-bit key. Two
rounds of a 32-bit xorshift-multiply hash then mix each token id with both halves of that key. All arithmetic is modulo
2^32 or 2^64, hence bit-identical everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN_64 = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed 64-bit number
_MIX_64 = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)  # 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_GOLDEN_32 = -0x61C8864F  # 0x9E3779B1 as a signed 32-bit number
_MIX_32 = (0x7FEB352D, -0x7B935975)  # 0x7FEB352D, 0x846CA68B
_BELOW_ONE = 1.0 - 2.0**-24
_CPU_BLOCK = 1 << 17  # elements per block, so that the dozen passes over a block stay in cache


def _shift_right(x: Tensor, bits: int, width: int) -> Tensor:
    """Shift signed integers of `width` bits right, filling with zeros."""
    return (x >> bits) & ((1 << (width - bits)) - 1)


def _mix_64(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30, 64)) * _MIX_64[0]
    x = (x ^ _shift_right(x, 27, 64)) * _MIX_64[1]
    return x ^ _shift_right(x, 31, 64)


def _mix_32_(x: Tensor) -> Tensor:
    """Mix in place, because x has rows * vocabulary elements."""
    x ^= _shift_right(x, 16, 32)
    x *= _MIX_32[0]
    x ^= _shift_right(x, 15, 32)
    x *= _MIX_32[1]
    x ^= _shift_right(x, 16, 32)
    return x


def noise_bits(seeds: Tensor, positions: Tensor, start: int, stop: int) -> Tensor:
    """Generate 32 random bits per (row, token id).

    seeds, positions: [rows] int64. start, stop: range of token ids.
    Returns [rows, stop - start] int32.
    """
    key = _mix_64(_mix_64(positions + _GOLDEN_64) + seeds)
    low = key.to(torch.int32)
    high = _shift_right(key, 32, 64).to(torch.int32)
    tokens = torch.arange(start, stop, dtype=torch.int32, device=seeds.device) * _GOLDEN_32
    bits = _mix_32_(tokens ^ low[:, None])
    return _mix_32_(bits.add_(high[:, None]))


def gumbel_noise(seeds: Tensor, positions: Tensor, start: int, stop: int) -> Tensor:
    """Generate standard Gumbel noise G = -log(-log(u)) per (row, token id). Arguments as in `noise_bits`.

    u = 1 - (bits + 1/2) / 2^32, so that all 32 bits resolve the upper tail, which decides an argmax: G reaches 22.9.
    Returns [rows, stop - start] float32.
    """
    noise = torch.empty(len(seeds), stop - start, dtype=torch.float32, device=seeds.device)
    rows = len(seeds) if seeds.is_cuda else max(1, _CPU_BLOCK // (stop - start))
    for first in range(0, len(seeds), rows):
        block = slice(first, first + rows)
        noise[block] = _gumbel(noise_bits(seeds[block], positions[block], start, stop))
    return noise


def _gumbel(bits: Tensor) -> Tensor:
    upper = bits.to(torch.float32)
    upper = torch.where(bits < 0, upper + 2.0**32, upper).add_(0.5).mul_(2.0**-32).clamp_(max=_BELOW_ONE)
    return upper.neg_().log1p_().neg_().log_().neg_()
