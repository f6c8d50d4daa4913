"""Operations between the matrix products of a layer: norms, gates, rotation. Computed in float32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.checks import check_dtype, check_pool
from kernels.gpu.tile import fp8_codes, kv_tensors
from kernels.kv.kv_pool import LayerKV
from kernels.ops import CLAMP, STEEPNESS, Gate

_WIDE = 1024  # elements per program of an elementwise kernel
_CLAMP, _STEEPNESS = tl.constexpr(CLAMP), tl.constexpr(STEEPNESS)


@triton.jit
def _norm_kernel(
    x: tl.tensor,
    delta: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    x_stride: tl.tensor,
    delta_stride: tl.tensor,
    size: tl.tensor,
    eps: tl.tensor,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Normalize a row. One program per row."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < size
    at = x + row * x_stride + i
    value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(delta + row * delta_stride + i, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(x.dtype.element_ty)
        tl.store(at, rounded, mask=inside)
        value = rounded.to(tl.float32)  # the norm is that of the stored value
    factor = tl.rsqrt(tl.sum(value * value, 0) / size + eps)
    scaled = value * factor * tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * size + i, scaled.to(out.dtype.element_ty), mask=inside)


def norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """See kernels.ops.Ops.norm. Rows may be strided; the elements of a row must be contiguous."""
    check_dtype(x)
    rows, size = x.shape
    if x.stride(1) != 1 or (delta is not None and delta.stride(1) != 1):
        raise ValueError("norm: elements of a row are not contiguous")
    out = torch.empty(rows, size, dtype=x.dtype, device=x.device)
    if rows:
        other = x if delta is None else delta
        strides = x.stride(0), other.stride(0)
        block = triton.next_power_of_2(size)
        _norm_kernel[(rows,)](
            x, other, weight, out, *strides, size, eps, ADD=delta is not None, BLOCK=block, num_warps=_warps(block)
        )
    return out


def _warps(elements: int) -> int:
    """Return the number of warps for a program with so many elements: 8 or more per thread."""
    return min(16, max(1, elements // 256))


@triton.jit
def join_halves(gate: tl.tensor, value: tl.tensor, GATE: tl.constexpr) -> tl.tensor:
    """Join gates and values, in float32. GATE: see kernels.ops.Gate; all of them are g / (1 + e^-z) times a value."""
    z = gate
    if GATE == "gelu_tanh":
        z = gate * (gate * gate * 0.044715 + 1.0) * 1.5957691216057308  # 2 sqrt(2 / pi)
    if GATE == "clamped_silu":  # by comparisons, because NaN must stay
        gate = tl.where(gate > _CLAMP, _CLAMP, gate)
        z = gate * _STEEPNESS
        value = tl.where(value > _CLAMP, _CLAMP, value)
        value = tl.where(value < -_CLAMP, -_CLAMP, value) + 1.0
    return gate / (1.0 + tl.exp(-z)) * value


@triton.jit
def _gate_kernel(
    pairs: tl.tensor, out: tl.tensor, stride: tl.tensor, size: tl.tensor, GATE: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """Join a block of features. One program per row and block."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    gate = tl.load(pairs + row * stride + i, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(pairs + row * stride + size + i, mask=inside, other=0.0).to(tl.float32)
    result = join_halves(gate, value, GATE)
    tl.store(out + row * size + i, result.to(out.dtype.element_ty), mask=inside)


def apply_gate(pairs: Tensor, gate: Gate) -> Tensor:
    """Join gates and values: [rows, 2 size], gates first, to [rows, size]."""
    check_dtype(pairs)
    rows, size = pairs.shape[0], pairs.shape[1] // 2
    if pairs.stride(1) != 1:
        raise ValueError("apply_gate: elements of a row are not contiguous")
    out = torch.empty(rows, size, dtype=pairs.dtype, device=pairs.device)
    if rows:
        block = min(_WIDE, triton.next_power_of_2(size))
        grid = rows, triton.cdiv(size, block)
        _gate_kernel[grid](pairs, out, pairs.stride(0), size, GATE=gate, BLOCK=block)
    return out


@triton.jit
def _rotary_kernel(
    qkv: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    positions: tl.tensor,
    slots: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    q_norm: tl.tensor,
    k_norm: tl.tensor,
    token_stride: tl.tensor,
    page_stride: tl.tensor,
    heads: tl.tensor,
    kv_heads: tl.tensor,
    eps: tl.tensor,
    PAGE_SIZE: tl.constexpr,
    NORM: tl.constexpr,
    FP8: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Rotate and store a head. One program per token and head: those of queries, then keys, then values."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tl.arange(0, BLOCK)
    inside = i < HALF
    at = qkv + token * token_stride + head * (2 * HALF) + i
    first = tl.load(at, mask=inside, other=0.0)
    second = tl.load(at + HALF, mask=inside, other=0.0)
    if head < heads + kv_heads:
        if NORM:
            wide, wide_too = first.to(tl.float32), second.to(tl.float32)
            squares = tl.sum(wide * wide, 0) + tl.sum(wide_too * wide_too, 0)
            factor = tl.rsqrt(squares / (2 * HALF) + eps)
            if head < heads:
                weight = tl.load(q_norm + i, mask=inside, other=0.0).to(tl.float32)
                weight_too = tl.load(q_norm + HALF + i, mask=inside, other=0.0).to(tl.float32)
            else:
                weight = tl.load(k_norm + i, mask=inside, other=0.0).to(tl.float32)
                weight_too = tl.load(k_norm + HALF + i, mask=inside, other=0.0).to(tl.float32)
            first = (wide * factor * weight).to(qkv.dtype.element_ty)
            second = (wide_too * factor * weight_too).to(qkv.dtype.element_ty)
        angle = tl.load(positions + token) * HALF + i
        c = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
        a, b = first.to(tl.float32), second.to(tl.float32)
        first = (a * c - b * s).to(qkv.dtype.element_ty)
        second = (b * c + a * s).to(qkv.dtype.element_ty)
        tl.store(at, first, mask=inside)
        tl.store(at + HALF, second, mask=inside)
    if head >= heads:
        slot = tl.load(slots + token)
        page, offset = slot // PAGE_SIZE, slot % PAGE_SIZE
        is_value = head >= heads + kv_heads
        of = head - heads
        if is_value:
            of -= kv_heads
        to = page * page_stride + (of * PAGE_SIZE + offset) * (2 * HALF) + i
        half, half_too = first, second
        if FP8:
            half, half_too = fp8_codes(first.to(tl.float32)), fp8_codes(second.to(tl.float32))
        if is_value:
            tl.store(v + to, half, mask=inside)
            tl.store(v + to + HALF, half_too, mask=inside)
        else:
            tl.store(k + to, half, mask=inside)
            tl.store(k + to + HALF, half_too, mask=inside)


def rotary(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    kv: LayerKV,
    norms: tuple[Tensor, Tensor, float] | None = None,
) -> None:
    """Rotate queries and keys in place, after the norms if there are any, and store keys and values in the pool.

    qkv: [tokens, heads + 2 kv_heads, head_dim]. cos, sin: [positions, head_dim / 2], for all positions. positions,
    slots: [tokens] int64. norms: weights of the norms of queries and of keys, [head_dim] each, and their eps.
    """
    check_dtype(qkv)
    tokens, all_heads, head_dim = qkv.shape
    _, kv_heads, page_size, _ = kv.k.shape
    if qkv.stride()[1:] != (head_dim, 1):
        raise ValueError("rotary: heads of a token are not contiguous")
    page_stride = check_pool(kv)
    if not tokens:
        return
    of_q, of_k, eps = norms or (qkv, qkv, 0.0)
    half = head_dim // 2
    _rotary_kernel[(tokens, all_heads)](
        qkv,
        cos,
        sin,
        positions,
        slots,
        *kv_tensors(kv)[:2],
        of_q,
        of_k,
        qkv.stride(0),
        page_stride,
        all_heads - 2 * kv_heads,
        kv_heads,
        eps,
        PAGE_SIZE=page_size,
        NORM=norms is not None,
        FP8=kv.kind == "fp8",
        HALF=half,
        BLOCK=triton.next_power_of_2(half),
        num_warps=1,
    )
