"""Paged attention: ragged queries over page lists. Long lists are split over programs and merged by log-sum-exp.

A tile holds some queries of one row, for all query heads of one KV head, so that one read of a page serves them all,
and their votes (votes.py). Pages that rows share are a row of their own, with the queries of all of these rows. How
queries become tiles: query_tiles.py.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.base import Ballot
from kernels.gpu import INTERPRETED
from kernels.gpu.checks import check_ballot, check_dtype, check_pool
from kernels.gpu.merge import merge_spans
from kernels.gpu.query_tiles import Tiles
from kernels.gpu.tile import kv_tensors, load_tile, masked_scores, product, tile_shape
from kernels.gpu.votes import VotingRows, count_votes, finish_votes
from kernels.kv.kv_pool import LayerKV

SPAN = 256
"""Smallest number of KV slots for a program of its own."""
_PROGRAMS = 1024  # lists are not split beyond this many programs: a few times those that a device runs at once
_SPANS = 64  # largest number that one program merges
VOTE_BYTES = 64 << 20
"""Largest memory of the sums from which votes are finished: 8 bytes per query head and sum, over the lists of all rows,
voting or not. With 32 heads and sums over pages of 16 slots that is 16 bytes per row and slot. Layers use it one after
another."""
_MIN_GRAIN, _VOTING_TILE = 8, 8192
"""Fewest slots of a sum, and largest tile (queries times elements of a head), for which programs have the registers to
keep sums on sm_80; half of it with KV that is converted in registers."""
_STAGES = 5
"""Triton's stages of the loop over slots: page ids, keys and values, and products lie two iterations apart each, so
that loads of the next two iterations' keys and values are under way. With up to 4 stages they lie one apart, keys and
values have a single buffer, and their loads begin only after the products that still read it."""


_UNTYPED = [
    *("list_stride", "head_list_stride", "rows", "tokens", "span", "spans", "prefix_tiles", "prefix_spans"),
    *("grains", "num_sealed"),
]
"""Numbers whose values do not make another kernel."""


@triton.jit(do_not_specialize=_UNTYPED)
def _attend_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    k_records: tl.tensor,
    v_records: tl.tensor,
    num_sealed: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    tile_row: tl.tensor,
    tile_first: tl.tensor,
    row_start: tl.tensor,
    queries: tl.tensor,
    lengths: tl.tensor,
    pages: tl.tensor,
    skipped: tl.tensor,
    list_rows: tl.tensor,
    query_tokens: tl.tensor,
    voters: tl.tensor,
    vote_sums: tl.tensor,
    sinks: tl.tensor,
    scale: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    page_stride: tl.tensor,
    list_stride: tl.tensor,
    head_list_stride: tl.tensor,
    rows: tl.tensor,
    tokens: tl.tensor,
    span: tl.tensor,
    spans: tl.tensor,
    prefix_tiles: tl.tensor,
    prefix_spans: tl.tensor,
    grains: tl.tensor,
    PREFIXES: tl.constexpr,
    SINKS: tl.constexpr,
    GRAIN: tl.constexpr,
    WINDOW: tl.constexpr,
    KV: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    Q: tl.constexpr,
    CUTS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    """Attend over one span of slots. One program per cut of a tile, KV head and span.

    A tile is cut into CUTS programs of M queries each, neighbours in the grid, which read the same keys at about the
    same time. Its list is cut evenly into at most `spans` spans, none shorter than `span`. Slots are numbered in 32
    bits inside a list, and in 64 in the pool. out: [spans, tokens, heads, HEAD_DIM]. lse: [spans, tokens, heads].

    PREFIXES: the first tiles are those of prefixes, of which all queries see all; their lists are cut into
    `prefix_spans`, and their results lie after those of the others. All programs are in one dimension then, span by
    span.

    SINKS: each query's first span has its head's sink, not counted among the voters' sums.

    GRAIN: slots of which the voters' sums are kept, see votes.py; 0: none vote. Not with PREFIXES. Only tiles that hold
    voters do more for it.

    WINDOW: see AttentionBatch.window. The list is cut from the first slot on that a query of the program sees; where
    tiles may be of sealed pages, from the tile on that has it. Not with PREFIXES or GRAIN.
    """
    dtype: tl.constexpr = q.dtype.element_ty
    head = tl.program_id(1)
    program, part = tl.program_id(0), tl.program_id(2)
    is_prefix = False
    if PREFIXES:
        of_prefixes = prefix_tiles * CUTS
        others = program - of_prefixes * prefix_spans
        is_prefix = others < 0
        in_span = tl.where(is_prefix, of_prefixes, (tl.num_programs(0) - of_prefixes * prefix_spans) // spans)
        program = tl.where(is_prefix, program, others)
        part = program // in_span
        program = program % in_span + tl.where(is_prefix, 0, of_prefixes)
    tile = program // CUTS
    row = tl.load(tile_row + tile)
    if row < rows:
        n_queries, length = tl.load(queries + row).to(tl.int32), tl.load(lengths + row).to(tl.int32)
        m = program % CUTS * M + tl.arange(0, M)
        d = tl.arange(0, D)
        query = tl.load(tile_first + tile).to(tl.int32) + m // GROUP
        live = (m < Q * GROUP) & (query < n_queries)
        visible = tl.where(live, length - n_queries + query + 1, 0)
        token = tl.load(row_start + row) + query
        if PREFIXES:
            visible = tl.where(live & is_prefix, length, visible)
            token = tl.load(query_tokens + token, mask=live, other=0)
        of = head * GROUP + m % GROUP
        q_at = token * token_stride + of * head_stride
        in_head = d < HEAD_DIM
        q_tile = tl.load(q + q_at[:, None] + d[None, :], mask=live[:, None] & in_head[None, :], other=0.0)
        top = tl.full([M], float("-inf"), tl.float32)
        mass = tl.zeros([M], tl.float32)
        mixed = tl.zeros([M, D], tl.float32)
        if SINKS:  # as if a slot with a value of zero had been read
            begins = part == 0
            if PREFIXES:
                begins = begins & (is_prefix == 0)
            top = tl.where(begins, tl.load(sinks + of), top)
            mass = tl.where(begins, 1.0, mass)
        first = 0
        if WINDOW:
            first = tl.maximum(tl.min(tl.where(live, visible, length), 0) - WINDOW, 0)
            if KV != "dense" and KV != "fp8":
                first = first // N * N
        of_list = row
        out_part = part
        if PREFIXES:
            first = tl.load(skipped + row).to(tl.int32)
            of_list = tl.load(list_rows + row)
            out_part = tl.where(is_prefix, part + spans, part)
            spans = tl.where(is_prefix, prefix_spans, spans)
        if GRAIN:
            behind = n_queries - 1 - query
            one, other = tl.load(voters + row * 2), tl.load(voters + row * 2 + 1)
            heads = tl.num_programs(1) * GROUP
            column = tl.where(behind == one, 0, 1)
            sums_at = tl.where(live & ((behind == one) | (behind == other)), (column * heads + of) * grains, -1)
            sums = vote_sums + row * (2 * heads * grains)
            has_voters = tl.max(sums_at, 0) >= 0
        page_list = pages + of_list * list_stride + head * head_list_stride
        max_visible = tl.max(visible, 0)  # not beyond `first` where no query sees anything: nothing is read
        each = tl.maximum(span, tl.cdiv(tl.cdiv(max_visible - first, spans), N) * N)
        begin = first + part * each
        end = tl.minimum(begin + each, max_visible)
        for at in range(begin, end, N):
            slot = at + tl.arange(0, N)
            listed = slot < end  # later slots may hold another request's overflow: they are never read
            page = tl.load(page_list + slot // PAGE_SIZE, mask=listed, other=0)
            of_page = page, at, end, head, num_sealed, page_stride
            k_tile = load_tile(k, k_records, *of_page, KV, True, dtype, PAGE_SIZE, HEAD_DIM, N, D)
            v_tile = load_tile(v, v_records, *of_page, KV, False, dtype, PAGE_SIZE, HEAD_DIM, N, D)
            mask = listed[None, :] & (slot[None, :] < visible[:, None])
            if WINDOW:
                mask = mask & (slot[None, :] >= visible[:, None] - WINDOW)
            scores = masked_scores(q_tile, k_tile, scale, mask, WIDEN)
            new_top = tl.maximum(top, tl.max(scores, 1))
            against = tl.where(new_top == float("-inf"), 0.0, new_top)
            weights = tl.exp(scores - against[:, None])
            shrink = tl.exp(top - against)
            mass = mass * shrink + tl.sum(weights, 1)
            mixed = mixed * shrink[:, None] + product(weights.to(dtype), v_tile, WIDEN)
            top = new_top
            if GRAIN:  # noqa: SIM102 (the outer condition decides what is compiled)
                if has_voters:
                    some = tl.sum(tl.reshape(weights, [M, N // GRAIN, GRAIN]), 2)
                    logs = against[:, None] + tl.log(tl.where(some > 0, some, 1.0))
                    tl.store(
                        sums + sums_at[:, None] + (at // GRAIN + tl.arange(0, N // GRAIN))[None, :],
                        tl.where(some > 0, logs, float("-inf")),
                        mask=(sums_at >= 0)[:, None],
                    )
        # A query that sees nothing of the span gets zero, with a log-sum-exp of -inf.
        mass = tl.where(mass > 0, mass, 1.0)
        result = mixed / mass[:, None]
        to = (out_part.to(tl.int64) * tokens + token) * (tl.num_programs(1) * GROUP) + of
        tl.store(
            out + to[:, None] * HEAD_DIM + d[None, :],
            result.to(out.dtype.element_ty),
            mask=live[:, None] & in_head[None, :],
        )
        tl.store(lse + to, top + tl.log(mass), mask=live)


def attend(
    tiles: Tiles, kv: LayerKV, q: Tensor, scale: float, span: int = SPAN, ballot: Ballot | None = None
) -> tuple[Tensor, Tensor]:
    """See kernels.attention.base. q: [tokens, heads, head_dim]; the elements of a head are contiguous.

    span: smallest number of KV slots for a program of its own, a multiple of 64. Returns o in q's dtype, and the
    log-sum-exp [tokens, heads] float32.

    ballot: votes to count, in the same read. Keys are read once more for it where units have fewer than _MIN_GRAIN
    slots, where tiles are larger than _VOTING_TILE (chunks with a head_dim of 256), where the sums take more than
    VOTE_BYTES, and where pages are shared, since a prefix's tiles hold queries of many rows.
    """
    check_dtype(q)
    tokens, heads, head_dim = q.shape
    _, kv_heads, page_size, _ = kv.k.shape
    if q.stride(2) != 1:
        raise ValueError("attention: elements of a head are not contiguous")
    page_stride = check_pool(kv)
    if ballot is not None:
        check_ballot(ballot)
    group, kind = heads // kv_heads, kv.kind
    pages = tiles.pages[kv.index] if tiles.per_layer else tiles.pages
    width = pages.shape[-1]
    lists = pages.stride(0), pages.stride(1) if pages.dim() == 3 else 0
    shape = tile_shape(tiles.block * group, head_dim, q.dtype, kind)
    cuts = triton.cdiv(tiles.block * group, shape.m)
    prefixes, prefix_tiles, prefix_spans = tiles.prefixes, 0, 0
    spans, tile_count = 0, len(tiles.row)
    if prefixes is None:
        slots = min(width * page_size, tiles.window + tiles.block - 1) if tiles.window else width * page_size
        spans = _spans(slots, tile_count * cuts * kv_heads, span)
        grid = tile_count * cuts, kv_heads, spans
    else:
        prefix_tiles, tile_count = prefixes.tiles, tile_count - prefixes.tiles
        prefix_spans, spans = (
            min(_SPANS // 2, _spans(slots, count * cuts * kv_heads, span))
            for slots, count in zip(prefixes.slots, (prefix_tiles, tile_count), strict=True)
        )
        grid = (prefix_tiles * prefix_spans + tile_count * spans) * cuts, kv_heads, 1
    all_spans = spans + prefix_spans
    unused = tiles.row
    grain, sums = math.gcd(ballot.unit, shape.n) if ballot else 0, None
    if (
        grain >= _MIN_GRAIN
        and prefixes is None
        and shape.m * shape.d <= (_VOTING_TILE if kind == "dense" else _VOTING_TILE // 2)
    ):
        grains = triton.cdiv(width * page_size, shape.n) * shape.n // grain
        sums = _room_for_sums(len(tiles.queries), heads, grains, q.device)
    out = torch.empty(tokens, heads, head_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(tokens, heads, dtype=torch.float32, device=q.device)
    parts, part_lse = out, lse
    if all_spans > 1:
        parts = torch.empty(all_spans, *out.shape, dtype=torch.float32, device=q.device)
        part_lse = torch.empty(all_spans, *lse.shape, dtype=torch.float32, device=q.device)
    _attend_kernel[grid](
        q,
        *kv_tensors(kv),
        parts,
        part_lse,
        *(tiles.row, tiles.first, tiles.start, tiles.queries, tiles.lengths, pages),
        *((prefixes.skipped, prefixes.listed, prefixes.tokens) if prefixes else (unused, unused, unused)),
        ballot.voters if ballot else unused,
        unused if sums is None else sums,
        unused if kv.sinks is None else kv.sinks,
        scale,
        q.stride(0),
        q.stride(1),
        page_stride,
        *lists,
        len(tiles.queries),
        tokens,
        span,
        spans,
        prefix_tiles,
        prefix_spans,
        0 if sums is None else sums.shape[3],
        PREFIXES=prefixes is not None,
        SINKS=kv.sinks is not None,
        GRAIN=0 if sums is None else grain,
        WINDOW=tiles.window,
        KV=kind,
        PAGE_SIZE=page_size,
        GROUP=group,
        HEAD_DIM=head_dim,
        Q=tiles.block,
        CUTS=cuts,
        M=shape.m,
        N=shape.n,
        D=shape.d,
        WIDEN=INTERPRETED,
        num_warps=shape.warps,
        maxnreg=shape.registers if sums is None else 255,  # of two programs per multiprocessor
        num_stages=_STAGES,
    )
    if all_spans > 1:
        merge_spans(parts, part_lse, out, lse, spans, prefix_spans, prefixes.shares if prefixes else None)
    rows = VotingRows(tiles.start, tiles.queries, tiles.lengths)
    if ballot is not None and sums is not None:
        finish_votes(ballot, rows, sums, grain, lse)
    elif ballot is not None:
        count_votes(ballot, rows, pages, kv, q, scale, lse)
    return out, lse


def _room_for_sums(rows: int, heads: int, grains: int, device: torch.device) -> Tensor | None:
    """Allocate the sums of two voters of each row, unless they take more than VOTE_BYTES."""
    shape = rows, 2, heads, grains
    return torch.empty(shape, dtype=torch.float32, device=device) if math.prod(shape) * 4 <= VOTE_BYTES else None


def _spans(slots: int, programs: int, span: int) -> int:
    """Return the number of spans to cut lists into: as many as keep the device busy, none shorter than `span`.

    slots: largest length of a list. programs: number of programs without a split.
    """
    return max(1, min(slots // span, _PROGRAMS // programs, _SPANS))
