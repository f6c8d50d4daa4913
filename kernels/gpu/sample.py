"""The coupled sampling rule over a slice of the vocabulary: argmax of logit / T + G(seed, position, token).

Its integers equal those of kernels.noise bit for bit; their logarithms may differ in the last bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.checks import check_dtype

_PART = 4096  # tokens per program


@triton.jit
def _mix_64(x: tl.tensor) -> tl.tensor:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _mix_32(x: tl.tensor) -> tl.tensor:
    x = x ^ (x >> 16)
    x = tl.mul(x, 0x7FEB352D, sanitize_overflow=False)  # intended to wrap modulo 2^32
    x = x ^ (x >> 15)
    x = tl.mul(x, 0x846CA68B, sanitize_overflow=False)
    return x ^ (x >> 16)


@triton.jit
def _bits(seed: tl.tensor, position: tl.tensor, tokens: tl.tensor) -> tl.tensor:
    """Mix a row's key with token ids. seed, position: int64. tokens: uint32. Returns uint32, one per token."""
    key = _mix_64(_mix_64(position.to(tl.uint64) + 0x9E3779B97F4A7C15) + seed.to(tl.uint64))
    low, high = (key & 0xFFFFFFFF).to(tl.uint32), (key >> 32).to(tl.uint32)
    mixed = _mix_32(tl.mul(tokens, 0x9E3779B1, sanitize_overflow=False) ^ low)
    return _mix_32(tl.add(mixed, high, sanitize_overflow=False))


@triton.jit
def _gumbel(bits: tl.tensor) -> tl.tensor:
    """Compute -log(-log(1 - u)) with u = (bits + 1/2) / 2^32, rounded as in kernels.noise."""
    signed = bits.to(tl.int32, bitcast=True)
    upper = signed.to(tl.float32)
    upper = tl.where(signed < 0, upper + 4294967296.0, upper)
    upper = tl.minimum((upper + 0.5) * 2.3283064365386963e-10, 0.999999940395355224609375)
    # log(1 - u): the factor u / (1 - (1 - u)) corrects for the rounding of 1 - u.
    rest = 1.0 - upper
    lost = 1.0 - rest
    tiny = lost == 0.0
    log_rest = tl.where(tiny, -upper, tl.log(rest) * tl.div_rn(upper, tl.where(tiny, 1.0, lost)))
    return -tl.log(-log_rest)


@triton.jit
def _bits_kernel(
    seeds: tl.tensor, positions: tl.tensor, out: tl.tensor, first: tl.tensor, size: tl.tensor, BLOCK: tl.constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    bits = _bits(tl.load(seeds + row), tl.load(positions + row), (first + i).to(tl.uint32))
    tl.store(out + row * size + i, bits.to(tl.int32, bitcast=True), mask=i < size)


def noise_bits(seeds: Tensor, positions: Tensor, start: int, stop: int) -> Tensor:
    """Compute kernels.noise.noise_bits with the code that the kernel below uses."""
    size = stop - start
    out = torch.empty(len(seeds), size, dtype=torch.int32, device=seeds.device)
    block = min(_PART, triton.next_power_of_2(size))
    _bits_kernel[(len(seeds), triton.cdiv(size, block))](seeds, positions, out, start, size, BLOCK=block)
    return out


@triton.jit
def _part_kernel(
    logits: tl.tensor,
    temperature: tl.tensor,
    seeds: tl.tensor,
    positions: tl.tensor,
    values: tl.tensor,
    tokens: tl.tensor,
    stride: tl.tensor,
    size: tl.tensor,
    first: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Find a part's largest value, NaN if one is, and the lowest id among the largest numbers. One program per row and
    part of the vocabulary."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = part * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    value = tl.load(logits + row * stride + i, mask=inside, other=float("-inf")).to(tl.float32)
    heat = tl.load(temperature + row).to(tl.float32)
    if heat > 0:
        bits = _bits(tl.load(seeds + row), tl.load(positions + row), (first + i).to(tl.uint32))
        value = tl.div_rn(value, heat) + _gumbel(bits)
    unordered = tl.max(tl.where(inside & (value != value), 1, 0), 0)
    value = tl.where(inside & (value == value), value, float("-inf"))
    best = tl.max(value, 0)
    token = tl.min(tl.where(inside & (value == best), i, 2147483647), 0)
    at = row * tl.num_programs(1) + part
    tl.store(values + at, tl.where(unordered > 0, float("nan"), best))
    tl.store(tokens + at, token.to(tl.int64) + first)


@triton.jit
def _best_kernel(
    values: tl.tensor,
    tokens: tl.tensor,
    best_value: tl.tensor,
    best_token: tl.tensor,
    parts: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Find the best of a row's parts, NaN if a part's is. One program per row."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < parts
    value = tl.load(values + row * parts + i, mask=inside, other=float("-inf"))
    token = tl.load(tokens + row * parts + i, mask=inside, other=0x7FFFFFFFFFFFFFFF)
    unordered = tl.max(tl.where(inside & (value != value), 1, 0), 0)
    best = tl.max(tl.where(value == value, value, float("-inf")), 0)
    tl.store(best_value + row, tl.where(unordered > 0, float("nan"), best))
    eligible = inside & ((value == best) | (value != value))
    tl.store(best_token + row, tl.min(tl.where(eligible, token, 0x7FFFFFFFFFFFFFFF), 0))


def sample(logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """See kernels.ops.Ops.sample. logits: [rows, size], at least one row and one token; the elements of a row are
    contiguous. Returns [rows] float32 and [rows] int64, by which ranks find the best of all their slices.
    """
    check_dtype(logits)
    rows, size = logits.shape
    if logits.stride(1) != 1:
        raise ValueError("sample: logits of a row are not contiguous")
    block = min(_PART, triton.next_power_of_2(size))
    parts = triton.cdiv(size, block)
    values = torch.empty(rows, parts, dtype=torch.float32, device=logits.device)
    tokens = torch.empty(rows, parts, dtype=torch.int64, device=logits.device)
    _part_kernel[(rows, parts)](
        logits, temperature, seeds, positions, values, tokens, logits.stride(0), size, first, BLOCK=block
    )
    if parts == 1:
        return values[:, 0], tokens[:, 0]
    value, token = values.new_empty(rows), tokens.new_empty(rows)
    _best_kernel[(rows,)](values, tokens, value, token, parts, BLOCK=triton.next_power_of_2(parts), num_warps=1)
    return value, token
