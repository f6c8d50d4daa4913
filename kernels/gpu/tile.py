"""Products of two tiles, shared by several kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product(a: tl.tensor, b: tl.tensor, WIDEN: tl.constexpr) -> tl.tensor:
    """Multiply a [M, K] by b [K, N], with sums in float32. float32 inputs are not rounded to TF32.

    WIDEN: convert the inputs to float32 first, which does not change the result. Triton's interpreter needs it, because
    it multiplies the bit patterns of bfloat16.
    """
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def masked_scores(q: tl.tensor, k: tl.tensor, scale: tl.tensor, visible: tl.tensor, WIDEN: tl.constexpr) -> tl.tensor:
    """Compute q [M, D] times k [D, N] times scale, -inf where `sees` [M, N] is false."""
    return tl.where(visible, product(q, k, WIDEN) * scale, float("-inf"))
