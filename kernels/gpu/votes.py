"""Votes of queries for the KV that their rows list (see kernels.attention.base.Ballot), in two ways.

Attention in Triton can keep, while it reads keys, each voter's log-sum-exp of each few slots, a divisor of the unit and
of the keys of a tile; `finish_votes` makes votes of these when the whole log-sum-exp is known. Where that is not done,
and for attention whose kernels count nothing, `count_votes` reads the keys of the voting rows once more.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.base import Ballot
from kernels.gpu import INTERPRETED
from kernels.gpu.checks import check_ballot, check_pool
from kernels.gpu.tile import kv_tensors, load_tile, masked_scores, tile_shape
from kernels.kv.kv_pool import LayerKV

_SUMS = 4096  # of a program that finishes votes: voting heads × units


class VotingRows(NamedTuple):
    """Rows of a batch on the device, [rows] int64: each one's first query, number of queries, and KV slots listed."""

    start: Tensor
    queries: Tensor
    lengths: Tensor


@triton.jit(do_not_specialize=["row_stride", "head_stride", "grains"])
def _finish_kernel(
    votes: tl.tensor,
    sums: tl.tensor,
    lse: tl.tensor,
    voters: tl.tensor,
    row_start: tl.tensor,
    queries: tl.tensor,
    lengths: tl.tensor,
    row_stride: tl.tensor,
    head_stride: tl.tensor,
    grains: tl.tensor,
    UNIT: tl.constexpr,
    GRAIN: tl.constexpr,
    GROUP: tl.constexpr,
    M: tl.constexpr,
    U: tl.constexpr,
) -> None:
    """Finish votes. One program per block of units, KV head and row.

    sums: [rows, 2, heads, grains] float32, log Σ e^score over GRAIN slots, of each voter; a second voter that is the
    first one has none of its own.
    """
    row, head, heads = tl.program_id(2), tl.program_id(1), tl.num_programs(1) * GROUP
    one, other = tl.load(voters + row * 2).to(tl.int32), tl.load(voters + row * 2 + 1).to(tl.int32)
    length = tl.load(lengths + row).to(tl.int32)
    begin = tl.program_id(0) * U
    if (one >= 0) & (begin * UNIT < length):
        m = tl.arange(0, M)
        unit = begin + tl.arange(0, U)
        behind = tl.where(m < GROUP, one, other)
        votes_too = (m < 2 * GROUP) & (behind >= 0)
        token = tl.load(row_start + row) + tl.load(queries + row) - 1 - behind
        of = head * GROUP + m % GROUP
        mass = tl.load(lse + token * heads + of, mask=votes_too, other=0.0)
        sees = tl.where(votes_too, length - behind, 0)
        column = tl.where((m < GROUP) | (other == one), 0, 1)
        at = ((row * 2 + column).to(tl.int64) * heads + of) * grains
        total = tl.zeros([U], tl.float32)
        for part in range(UNIT // GRAIN):
            grain = unit * (UNIT // GRAIN) + part
            seen = (grain * GRAIN)[None, :] < sees[:, None]  # later sums were never written
            each = tl.load(sums + at[:, None] + grain[None, :], mask=seen, other=float("-inf"))
            total += tl.sum(tl.exp(each - mass[:, None]), 0)
        to = votes + row.to(tl.int64) * row_stride + head.to(tl.int64) * head_stride
        tl.store(to + unit, total, mask=unit * UNIT < length)


@triton.jit(do_not_specialize=["num_sealed", "row_stride", "vote_head_stride", "list_stride", "head_list_stride"])
def _count_kernel(
    votes: tl.tensor,
    q: tl.tensor,
    k: tl.tensor,
    records: tl.tensor,
    num_sealed: tl.tensor,
    lse: tl.tensor,
    voters: tl.tensor,
    row_start: tl.tensor,
    queries: tl.tensor,
    lengths: tl.tensor,
    pages: tl.tensor,
    scale: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    page_stride: tl.tensor,
    list_stride: tl.tensor,
    head_list_stride: tl.tensor,
    row_stride: tl.tensor,
    vote_head_stride: tl.tensor,
    KV: tl.constexpr,
    UNIT: tl.constexpr,
    SLOTS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    U: tl.constexpr,
    D: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    """Count votes for U units of SLOTS slots in all. One program per block of units, KV head and row.

    Either a tile of N keys holds these units, or there is one unit, of any number of tiles.
    """
    row, head, heads = tl.program_id(2), tl.program_id(1), tl.num_programs(1) * GROUP
    one, other = tl.load(voters + row * 2).to(tl.int32), tl.load(voters + row * 2 + 1).to(tl.int32)
    length = tl.load(lengths + row).to(tl.int32)
    begin = tl.program_id(0) * SLOTS
    if (one >= 0) & (begin < length):
        last = tl.load(row_start + row) + tl.load(queries + row) - 1
        d = tl.arange(0, D)
        in_head = d < HEAD_DIM
        page_list = pages + row.to(tl.int64) * list_stride + head * head_list_stride
        end = tl.minimum(begin + SLOTS, length)
        total = tl.zeros([N], tl.float32)
        for at in range(begin, end, N):
            slot = at + tl.arange(0, N)
            listed = slot < end
            page = tl.load(page_list + slot // PAGE_SIZE, mask=listed, other=0)
            of_page = page, at, end, head, num_sealed, page_stride
            k_tile = load_tile(k, records, *of_page, KV, True, q.dtype.element_ty, PAGE_SIZE, HEAD_DIM, N, D)
            for first in range(0, 2 * GROUP, M):
                m = first + tl.arange(0, M)
                behind = tl.where(m < GROUP, one, other)
                votes_too = (m < 2 * GROUP) & (behind >= 0)
                token = last - behind
                of = head * GROUP + m % GROUP
                q_at = token * token_stride + of * head_stride
                q_mask = votes_too[:, None] & in_head[None, :]
                q_tile = tl.load(q + q_at[:, None] + d[None, :], mask=q_mask, other=0.0)
                mass = tl.load(lse + token * heads + of, mask=votes_too, other=0.0)
                sees = tl.where(votes_too, length - behind, 0)
                mask = listed[None, :] & (slot[None, :] < sees[:, None])
                scores = masked_scores(q_tile, k_tile, scale, mask, WIDEN)
                total += tl.sum(tl.exp(scores - mass[:, None]), 0)
        unit = tl.program_id(0) * U + tl.arange(0, U)
        to = votes + row.to(tl.int64) * row_stride + head.to(tl.int64) * vote_head_stride
        tl.store(to + unit, tl.sum(tl.reshape(total, [U, N // U]), 1), mask=unit * UNIT < length)


def finish_votes(ballot: Ballot, rows: VotingRows, sums: Tensor, grain: int, lse: Tensor) -> None:
    """Write the ballot's votes. sums: [rows, 2, heads, grains] float32, see _finish_kernel. grain: slots of each sum.
    lse: [tokens, heads]."""
    voting, heads, grains = sums.shape[0], sums.shape[2], sums.shape[3]
    kv_heads = ballot.votes.shape[1]
    group, units = heads // kv_heads, _units(ballot, grains * grain)
    m = triton.next_power_of_2(2 * group)
    block = min(max(16, _SUMS // m), triton.next_power_of_2(units))
    _finish_kernel[(triton.cdiv(units, block), kv_heads, voting)](
        ballot.votes,
        sums,
        lse,
        ballot.voters,
        *rows,
        *ballot.votes.stride()[:2],
        grains,
        UNIT=ballot.unit,
        GRAIN=grain,
        GROUP=group,
        M=m,
        U=block,
    )


def count_votes(
    ballot: Ballot, rows: VotingRows, pages: Tensor, kv: LayerKV, q: Tensor, scale: float, lse: Tensor
) -> None:
    """Write the ballot's votes, in a pass over the keys of its rows: half of the bytes that attention to them reads.

    pages: [rows, width], or [rows, kv_heads, width]. q: [tokens, heads, head_dim]; the elements of a head are
    contiguous. lse: [tokens, heads] float32, the natural one.
    """
    check_ballot(ballot)
    _, heads, head_dim = q.shape
    _, kv_heads, page_size, _ = kv.k.shape
    group, width = heads // kv_heads, pages.shape[-1]
    shape = tile_shape(2 * group, head_dim, q.dtype, kv.kind)
    units = shape.n // ballot.unit if shape.n % ballot.unit == 0 else 1
    slots = units * ballot.unit
    blocks = triton.cdiv(_units(ballot, width * page_size), units)
    keys, _, records, _, num_sealed = kv_tensors(kv)
    _count_kernel[(blocks, kv_heads, len(ballot.voters))](
        ballot.votes,
        q,
        keys,
        records,
        num_sealed,
        lse,
        ballot.voters,
        *rows,
        pages,
        scale,
        q.stride(0),
        q.stride(1),
        check_pool(kv),
        pages.stride(0),
        pages.stride(1) if pages.dim() == 3 else 0,
        *ballot.votes.stride()[:2],
        KV=kv.kind,
        UNIT=ballot.unit,
        SLOTS=slots,
        PAGE_SIZE=page_size,
        GROUP=group,
        HEAD_DIM=head_dim,
        M=shape.m,
        N=shape.n,
        U=units,
        D=shape.d,
        WIDEN=INTERPRETED,
        num_warps=shape.warps,
        maxnreg=shape.registers,
    )


def _units(ballot: Ballot, slots: int) -> int:
    """Return the number of units to count. slots: largest length of a list."""
    return min(ballot.votes.shape[2], -(-slots // ballot.unit))
