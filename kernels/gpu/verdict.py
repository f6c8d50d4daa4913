"""Accept drafts and commit them, in one launch each; the reference is engine.speculation.verify.

Each line of row_spans, [rows, 4] int64, holds a row's slot, its number of new tokens, the index of its first sample,
and its number of samples.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _accept_kernel(
    tokens: tl.tensor,
    computed: tl.tensor,
    row_spans: tl.tensor,
    drafted: tl.tensor,
    target_tokens: tl.tensor,
    verdict: tl.tensor,
    stride: tl.tensor,
    max_samples: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Accept a row's drafts. One program per row of the round."""
    at = tl.program_id(0).to(tl.int64)
    row = tl.load(row_spans + at * 4)
    new = tl.load(row_spans + at * 4 + 1)
    first = tl.load(row_spans + at * 4 + 2)
    count = tl.load(row_spans + at * 4 + 3)
    step = tl.arange(0, BLOCK)
    inside = step < count
    token = tl.load(target_tokens + first + step, mask=inside, other=0)
    draft = tl.load(tokens + row * stride + tl.load(computed + row) + new + step, mask=inside, other=0)
    proposed = tl.load(drafted + at)
    fails = (step >= tl.minimum(proposed, count - 1)) | (draft != token)
    out = verdict + at * (max_samples + 2)
    tl.store(out, proposed)
    tl.store(out + 1, tl.min(tl.where(fails, step, BLOCK), 0).to(tl.int64))
    tl.store(out + 2 + step, token, mask=step < max_samples)


@triton.jit
def _commit_kernel(
    tokens: tl.tensor,
    computed: tl.tensor,
    row_spans: tl.tensor,
    verdict: tl.tensor,
    stride: tl.tensor,
    max_samples: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Commit a row's verdict. One program per row of the round."""
    at = tl.program_id(0).to(tl.int64)
    row = tl.load(row_spans + at * 4)
    length = tl.load(computed + row) + tl.load(row_spans + at * 4 + 1)
    step = tl.arange(0, BLOCK)
    token = tl.load(verdict + at * (max_samples + 2) + 2 + step, mask=step < max_samples, other=0)
    tl.store(tokens + row * stride + length + step, token.to(tl.int32), mask=step < tl.load(row_spans + at * 4 + 3))
    tl.store(computed + row, length + tl.load(verdict + at * (max_samples + 2) + 1))


def accept(
    tokens: Tensor, computed: Tensor, row_spans: Tensor, drafted: Tensor, target_tokens: Tensor, max_samples: int
) -> Tensor:
    """See kernels.ops.Ops.accept. Matrices must be contiguous."""
    verdict = torch.empty(len(row_spans), 2 + max_samples, dtype=torch.int64, device=tokens.device)
    if len(row_spans):
        block = triton.next_power_of_2(max(max_samples, 1))
        _accept_kernel[(len(row_spans),)](
            tokens,
            computed,
            row_spans,
            drafted,
            target_tokens,
            verdict,
            tokens.stride(0),
            max_samples,
            BLOCK=block,
            num_warps=1,
        )
    return verdict


def commit(tokens: Tensor, computed: Tensor, row_spans: Tensor, verdict: Tensor) -> None:
    """See kernels.ops.Ops.commit. Matrices must be contiguous, and row slots distinct."""
    if len(row_spans):
        max_samples = verdict.shape[1] - 2
        block = triton.next_power_of_2(max(max_samples, 1))
        _commit_kernel[(len(row_spans),)](
            tokens, computed, row_spans, verdict, tokens.stride(0), max_samples, BLOCK=block, num_warps=1
        )
