"""Sums of rows whose order depends on the row's length alone.

A library may choose another order for another number of rows or threads, and so another last bit: torch splits a sum
over threads by the number of rows. Here each step is an addition of elements, which has no order to choose.
"""

from __future__ import annotations

import torch
from torch import Tensor


def row_sum(x: Tensor) -> Tensor:
    """Sum each row pairwise: [rows, size] to [rows, 1], in the dtype of x."""
    while (size := x.shape[-1]) > 1:
        half = size // 2
        added = x[..., :half] + x[..., half : 2 * half]
        x = added if size == 2 * half else torch.cat([added, x[..., 2 * half :]], -1)
    return x


def row_logsumexp(x: Tensor) -> Tensor:
    """Compute the logarithm of each row's sum of exponentials: [rows, size] to [rows, 1]. Rows of -inf give -inf."""
    top = x.amax(-1, keepdim=True)
    shift = top.masked_fill(top.isinf(), 0.0)
    return row_sum((x - shift).exp_()).log_() + shift
