"""GPTQ (arXiv 2210.17323): round a matrix so that its products with typical inputs change least."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.weights.int4_weights import LEVELS, Int4Format
from kernels.weights.matrix import QuantizedMatrix, regular_groups

DAMPENING = 0.01
"""Share of the Hessian's mean diagonal that is added to its diagonal."""
_BLOCK = 128
"""Columns after which the columns behind them are updated. A block holds whole groups."""


def gptq(weight: Tensor, hessian: Tensor, int4: Int4Format) -> QuantizedMatrix:
    """Round a matrix column by column, and let the columns that are left make up for the error.

    A group's scale and zero point are computed before its first column is rounded, from what the columns are then. An
    input without any share in the Hessian changes nothing, and its column is rounded to nearest.

    weight: [rows, features], floating-point, finite. hessian: [features, features], finite: x^T x over inputs x
    [tokens, features], times any factor.
    """
    rows, features = weight.shape
    size = int4.group_size
    left = weight.float().t().clone(memory_format=torch.contiguous_format)  # [features, rows], so columns are adjacent
    inverse = _inverse_factor(hessian)
    codes = torch.empty(features, rows, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(rows, -(-features // size), device=weight.device)
    zeros = torch.empty_like(scales)
    block = max(1, _BLOCK // size) * size
    for start in range(0, features, block):
        stop = min(start + block, features)
        errors = torch.empty(stop - start, rows, device=weight.device)
        for column in range(start, stop):
            group, place = divmod(column, size)
            if place == 0:
                now = left[column : column + size].t()
                padded = F.pad(now, (0, size - now.shape[1]))
                scales[:, group : group + 1], zeros[:, group : group + 1] = int4.scales_and_zeros(padded[:, None])
            scale, zero = scales[:, group], zeros[:, group]
            code = ((left[column] / scale).round() + zero).clamp_(0, LEVELS)
            codes[column] = code.to(torch.uint8)
            error = (left[column] - (code - zero) * scale) / inverse[column, column]
            left[column + 1 : stop].addr_(inverse[column, column + 1 : stop], error, alpha=-1)
            errors[column - start] = error
        left[stop:].addmm_(inverse[start:stop, stop:].t(), errors, alpha=-1)
    return QuantizedMatrix(
        format=int4.name,
        codes=codes.t().contiguous(),
        scales=scales,
        mins=None if int4.symmetric else -zeros * scales,
        groups=regular_groups(features, size).to(weight.device),
        group_size=size,
    )


def _inverse_factor(hessian: Tensor) -> Tensor:
    """Return the upper triangular u with u^T u the inverse of the dampened Hessian, in float32. Computed in float64,
    in which the dampening is enough for any Hessian."""
    dampened = hessian.double()
    diagonal = dampened.diagonal().clone()
    added = DAMPENING * diagonal.mean()
    dampened = dampened + torch.diag(torch.where(diagonal > 0, added, 1.0))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(dampened))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()
