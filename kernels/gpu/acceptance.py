"""Accepting drafts and committing them: what becomes of a round's decisions, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _commit_kernel(
    tokens: tl.tensor,
    computed: tl.tensor,
    rows: tl.tensor,
    new: tl.tensor,
    drafted: tl.tensor,
    chosen: tl.tensor,
    first: tl.tensor,
    decided: tl.tensor,
    accepted: tl.tensor,
    stride: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """One program per row of the round."""
    at = tl.program_id(0)
    row = tl.load(rows + at)
    length = tl.load(computed + row)
    advance = tl.load(new + at)
    count = tl.load(decided + at)
    step = tl.arange(0, BLOCK)
    inside = step < count
    choice = tl.load(chosen + tl.load(first + at) + step, mask=inside, other=0)
    there = tokens + row * stride + length + advance + step
    draft = tl.load(there, mask=inside, other=0)
    fails = (step >= tl.minimum(tl.load(drafted + at), count - 1)) | (draft != choice)
    holding = tl.maximum(tl.min(tl.where(fails, step, BLOCK), 0), 0)
    tl.store(there, choice.to(tl.int32), mask=inside)
    tl.store(accepted + at, holding.to(tl.int64))
    tl.store(computed + row, length + advance + holding)


def commit(
    tokens: Tensor,
    computed: Tensor,
    rows: Tensor,
    new: Tensor,
    drafted: Tensor,
    chosen: Tensor,
    first: Tensor,
    decided: Tensor,
    *,
    most: int,
) -> Tensor:
    """Accept each row's drafts up to the first that is not what the target chooses there, and make that the state.

    It is the rule of coupled verification: a row's drafts stand in its token list, behind its committed tokens; the
    target's choices are written over them, those behind the first disagreement too, which count for nothing.

    tokens: [max_rows, max_len] int32 and computed: [max_rows] int64, changed in place. The rest is of the round's rows
    and int64. rows: [n] distinct row slots. new: [n], committed tokens whose KV the round wrote. drafted: [n], how many
    proposals count, at most decided - 1. chosen: all decisions, those of row i from first[i] on, decided[i] of them; 0
    where a row decides nothing. most: the largest decided. Returns accepted [n] int64.
    """
    accepted = torch.empty_like(new)
    if len(new):
        block = triton.next_power_of_2(max(most, 1))
        _commit_kernel[(len(new),)](
            tokens,
            computed,
            rows,
            new,
            drafted,
            chosen,
            first,
            decided,
            accepted,
            tokens.stride(0),
            BLOCK=block,
            num_warps=1,
        )
    return accepted
