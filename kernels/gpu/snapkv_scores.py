"""Attention of a row's last queries to its earlier keys, summed without a score matrix in memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu import INTERPRETED
from kernels.gpu.checks import check_dtype
from kernels.gpu.tile import masked_scores, tile_shape

_SPAN = 4096  # keys per program of the first pass


@triton.jit
def _queries(
    q: tl.tensor,
    head: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    m: tl.tensor,
    total: tl.tensor,
    d: tl.tensor,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
) -> tl.tensor:
    """Load rows m of the queries of a KV head, ordered by query, then by head: [M, D]."""
    at = (m // GROUP).to(tl.int64) * token_stride + (head * GROUP + m % GROUP) * head_stride
    inside = (m < total)[:, None] & (d < HEAD_DIM)[None, :]
    return tl.load(q + at[:, None] + d[None, :], mask=inside, other=0.0)


@triton.jit
def _mass_kernel(
    q: tl.tensor,
    k: tl.tensor,
    masses: tl.tensor,
    scale: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    kv_stride: tl.tensor,
    key_stride: tl.tensor,
    queries: tl.tensor,
    length: tl.tensor,
    SPAN: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    """Compute a span's log-sum-exp for each query. One program per block of queries, KV head and span of keys."""
    head, span = tl.program_id(1), tl.program_id(2)
    m = tl.program_id(0) * M + tl.arange(0, M)
    total = queries * GROUP
    d = tl.arange(0, D)
    q_tile = _queries(q, head, token_stride, head_stride, m, total, d, GROUP, HEAD_DIM)
    visible = length - queries + m // GROUP + 1
    top = tl.full([M], float("-inf"), tl.float32)
    mass = tl.zeros([M], tl.float32)
    keys = k + head.to(tl.int64) * kv_stride
    for start in range(span * SPAN, tl.minimum(length, span * SPAN + SPAN), N):
        n = start + tl.arange(0, N)
        at = keys + n.to(tl.int64) * key_stride
        k_tile = tl.load(at[:, None] + d[None, :], mask=(n < length)[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
        scores = masked_scores(q_tile, k_tile, scale, n[None, :] < visible[:, None], WIDEN)
        new_top = tl.maximum(top, tl.max(scores, 1))
        against = tl.where(new_top == float("-inf"), 0.0, new_top)
        mass = mass * tl.exp(top - against) + tl.sum(tl.exp(scores - against[:, None]), 1)
        top = new_top
    at = (head * tl.num_programs(2) + span) * total + m
    tl.store(masses + at, top + tl.log(tl.where(mass > 0, mass, 1.0)), mask=m < total)


@triton.jit
def _scores_kernel(
    q: tl.tensor,
    k: tl.tensor,
    masses: tl.tensor,
    summed: tl.tensor,
    scale: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    kv_stride: tl.tensor,
    key_stride: tl.tensor,
    queries: tl.tensor,
    length: tl.tensor,
    candidates: tl.tensor,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    """Sum the softmax weights of keys over all queries. One program per block of keys and KV head."""
    n = tl.program_id(0) * N + tl.arange(0, N)
    head = tl.program_id(1)
    total = queries * GROUP
    d = tl.arange(0, D)
    at = k + head.to(tl.int64) * kv_stride + n.to(tl.int64) * key_stride
    k_tile = tl.load(at[:, None] + d[None, :], mask=(n < length)[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    sums = tl.zeros([N], tl.float32)
    for start in range(0, total, M):
        m = start + tl.arange(0, M)
        q_tile = _queries(q, head, token_stride, head_stride, m, total, d, GROUP, HEAD_DIM)
        mask = (n[None, :] < (length - queries + m // GROUP + 1)[:, None]) & (m < total)[:, None]
        mass = tl.load(masses + head * total + m, mask=m < total, other=0.0)
        scores = masked_scores(q_tile, k_tile, scale, mask, WIDEN)
        sums += tl.sum(tl.exp(scores - mass[:, None]), 0)
    tl.store(summed + head.to(tl.int64) * candidates + n, sums, mask=n < candidates)


def snapkv_scores(
    q: Tensor,
    k: Tensor,
    scale: float,
    *,
    candidates: int,
    kernel: int,
    sinks: Tensor | None = None,
    span: int = _SPAN,
) -> Tensor:
    """See kernels.key_scores.snapkv_scores. Raises ValueError for float64.

    q: [queries, heads, head_dim]. k: [kv_heads, length, head_dim]. The elements of a head are contiguous in both. span:
    keys per program of the first pass, a multiple of 64.
    """
    check_dtype(q)
    queries, heads, head_dim = q.shape
    kv_heads, length, _ = k.shape
    if q.stride(2) != 1 or k.stride(2) != 1:
        raise ValueError("snapkv_scores: elements of a head are not contiguous")
    group = heads // kv_heads
    total = queries * group
    shape = tile_shape(total, head_dim, q.dtype)
    strides = q.stride(0), q.stride(1), k.stride(0), k.stride(1)
    sizes = {
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "M": shape.m,
        "N": shape.n,
        "D": shape.d,
        "WIDEN": INTERPRETED,
        "num_warps": shape.warps,
        "maxnreg": shape.registers,
    }
    spans = triton.cdiv(length, span)
    parts = torch.empty(kv_heads, spans, total, dtype=torch.float32, device=q.device)
    _mass_kernel[triton.cdiv(total, shape.m), kv_heads, spans](
        q, k, parts, scale, *strides, queries, length, SPAN=span, **sizes
    )
    masses = parts.logsumexp(1) if spans > 1 else parts[:, 0]
    if sinks is not None:
        by_query = sinks.view(kv_heads, 1, group).expand(-1, queries, -1)
        masses = torch.logaddexp(masses, by_query.reshape(kv_heads, total))
    summed = torch.empty(kv_heads, candidates, dtype=torch.float32, device=q.device)
    if candidates:
        _scores_kernel[triton.cdiv(candidates, shape.n), kv_heads](
            q, k, masses, summed, scale, *strides, queries, length, candidates, **sizes
        )
    # The average over neighbours commutes with the sum over heads.
    return F.avg_pool1d(summed[:, None], kernel, stride=1, padding=kernel // 2)[:, 0]
