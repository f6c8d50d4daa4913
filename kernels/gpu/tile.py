"""Products of two tiles, which several kernels take."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product(a: tl.tensor, b: tl.tensor, WIDEN: tl.constexpr) -> tl.tensor:
    """a [M, K] times b [K, N], summed in float32; float32 is not rounded to TF32.

    WIDEN: convert first, which changes nothing in the result. Triton's interpreter needs it: it multiplies the bit
    patterns of bfloat16.
    """
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def scores_of(q: tl.tensor, k: tl.tensor, scale: tl.tensor, sees: tl.tensor, WIDEN: tl.constexpr) -> tl.tensor:
    """q [M, D] times k [D, N] times scale, -inf where not `sees` [M, N]."""
    return tl.where(sees, product(q, k, WIDEN) * scale, float("-inf"))
