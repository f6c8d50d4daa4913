"""`kernels.acceptance` in one launch each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _accept_kernel(
    tokens: tl.tensor,
    computed: tl.tensor,
    ledger: tl.tensor,
    drafted: tl.tensor,
    chosen: tl.tensor,
    verdict: tl.tensor,
    stride: tl.tensor,
    most: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """One program per row of the round."""
    at = tl.program_id(0).to(tl.int64)
    row = tl.load(ledger + at * 4)
    new = tl.load(ledger + at * 4 + 1)
    first = tl.load(ledger + at * 4 + 2)
    count = tl.load(ledger + at * 4 + 3)
    step = tl.arange(0, BLOCK)
    inside = step < count
    choice = tl.load(chosen + first + step, mask=inside, other=0)
    draft = tl.load(tokens + row * stride + tl.load(computed + row) + new + step, mask=inside, other=0)
    proposed = tl.load(drafted + at)
    fails = (step >= tl.minimum(proposed, count - 1)) | (draft != choice)
    out = verdict + at * (most + 2)
    tl.store(out, proposed)
    tl.store(out + 1, tl.min(tl.where(fails, step, BLOCK), 0).to(tl.int64))
    tl.store(out + 2 + step, choice, mask=step < most)


@triton.jit
def _commit_kernel(
    tokens: tl.tensor,
    computed: tl.tensor,
    ledger: tl.tensor,
    verdict: tl.tensor,
    stride: tl.tensor,
    most: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """One program per row of the round."""
    at = tl.program_id(0).to(tl.int64)
    row = tl.load(ledger + at * 4)
    length = tl.load(computed + row) + tl.load(ledger + at * 4 + 1)
    step = tl.arange(0, BLOCK)
    choice = tl.load(verdict + at * (most + 2) + 2 + step, mask=step < most, other=0)
    tl.store(tokens + row * stride + length + step, choice.to(tl.int32), mask=step < tl.load(ledger + at * 4 + 3))
    tl.store(computed + row, length + tl.load(verdict + at * (most + 2) + 1))


def accept(tokens: Tensor, computed: Tensor, ledger: Tensor, drafted: Tensor, chosen: Tensor, most: int) -> Tensor:
    """See kernels.acceptance.accept. Matrices are contiguous."""
    verdict = torch.empty(len(ledger), 2 + most, dtype=torch.int64, device=tokens.device)
    if len(ledger):
        block = triton.next_power_of_2(max(most, 1))
        _accept_kernel[(len(ledger),)](
            tokens, computed, ledger, drafted, chosen, verdict, tokens.stride(0), most, BLOCK=block, num_warps=1
        )
    return verdict


def commit(tokens: Tensor, computed: Tensor, ledger: Tensor, verdict: Tensor) -> None:
    """See kernels.acceptance.commit. Matrices are contiguous, and row slots are all different."""
    if len(ledger):
        most = verdict.shape[1] - 2
        block = triton.next_power_of_2(max(most, 1))
        _commit_kernel[(len(ledger),)](
            tokens, computed, ledger, verdict, tokens.stride(0), most, BLOCK=block, num_warps=1
        )
