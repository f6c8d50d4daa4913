"""Merging attention over parts of the KV by log-sum-exp: o = Σ e^(lse_i - lse) o_i."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["spans", "prefix_spans"])
def _merge_kernel(
    parts: tl.tensor,
    part_lse: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    shares: tl.tensor,
    spans: tl.tensor,
    prefix_spans: tl.tensor,
    heads: tl.tensor,
    total: tl.tensor,
    PREFIXES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    S: tl.constexpr,
    D: tl.constexpr,
) -> None:
    """Merge the spans. One program per token and head: o = Σ e^(lse_i - lse) o_i.

    PREFIXES: tokens with a prefix have its spans too, after the others.
    """
    at = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, S)
    d = tl.arange(0, D)
    if PREFIXES:
        spans += tl.load(shares + tl.program_id(0) // heads).to(tl.int32) * prefix_spans
    inside = s < spans
    each = tl.load(part_lse + s * total + at, mask=inside, other=float("-inf"))
    top = tl.max(each, 0)
    weights = tl.exp(each - tl.where(top == float("-inf"), 0.0, top))
    mass = tl.sum(weights, 0)
    mass = tl.where(mass > 0, mass, 1.0)  # a query that sees nothing gets zero, as above
    values = tl.load(
        parts + (s * total + at)[:, None] * HEAD_DIM + d[None, :],
        mask=inside[:, None] & (d < HEAD_DIM)[None, :],
        other=0.0,
    )
    mixed = tl.sum(values * weights[:, None], 0) / mass
    tl.store(out + at * HEAD_DIM + d, mixed.to(out.dtype.element_ty), mask=d < HEAD_DIM)
    tl.store(lse + at, top + tl.log(mass))


def merge_spans(
    parts: Tensor,
    part_lse: Tensor,
    out: Tensor,
    lse: Tensor,
    spans: int,
    prefix_spans: int = 0,
    shares: Tensor | None = None,
) -> None:
    """Merge the spans of lists into out [tokens, heads, head_dim] and lse [tokens, heads].

    parts: [spans, tokens, heads, head_dim] float32. part_lse: [spans, tokens, heads]. prefix_spans: number of further
    spans of the tokens whose `shares` [tokens] int64 is 1; those of others are not read.
    """
    tokens, heads, head_dim = out.shape
    _merge_kernel[(tokens * heads,)](
        parts,
        part_lse,
        out,
        lse,
        part_lse if shares is None else shares,
        spans,
        prefix_spans,
        heads,
        tokens * heads,
        PREFIXES=shares is not None,
        HEAD_DIM=head_dim,
        S=triton.next_power_of_2(spans + prefix_spans),
        D=triton.next_power_of_2(head_dim),
    )


@triton.jit
def _merge_prefixes_kernel(
    out: tl.tensor,
    lse: tl.tensor,
    places: tl.tensor,
    of_prefixes: tl.tensor,
    of_prefixes_lse: tl.tensor,
    heads: tl.tensor,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
) -> None:
    """Merge a token's attention to a prefix into that to the rest. One program per token and head."""
    place = tl.load(places + tl.program_id(0) // heads)
    if place >= 0:
        at = tl.program_id(0).to(tl.int64)
        other = place * heads + at % heads
        d = tl.arange(0, D)
        inside = d < HEAD_DIM
        rest, prefix = tl.load(lse + at), tl.load(of_prefixes_lse + other)
        top = tl.maximum(rest, prefix)
        of_rest, of_prefix = tl.exp(rest - top), tl.exp(prefix - top)
        mass = of_rest + of_prefix
        mixed = tl.load(out + at * HEAD_DIM + d, mask=inside).to(tl.float32) * of_rest
        mixed += tl.load(of_prefixes + other * HEAD_DIM + d, mask=inside).to(tl.float32) * of_prefix
        tl.store(out + at * HEAD_DIM + d, (mixed / mass).to(out.dtype.element_ty), mask=inside)
        tl.store(lse + at, top + tl.log(mass))


def merge_prefixes(out: Tensor, lse: Tensor, places: Tensor, of_prefixes: Tensor, of_prefixes_lse: Tensor) -> None:
    """See kernels.attention.shared_reading. All tensors are contiguous; log-sum-exps are float32."""
    tokens, heads, head_dim = out.shape
    _merge_prefixes_kernel[(tokens * heads,)](
        out,
        lse,
        places,
        of_prefixes,
        of_prefixes_lse,
        heads,
        HEAD_DIM=head_dim,
        D=triton.next_power_of_2(head_dim),
        num_warps=1,
    )
