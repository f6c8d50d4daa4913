"""Rotary position embedding (RoFormer, arXiv 2104.09864).

Half-rotation layout: element i of a head pairs with element i + head_dim / 2.

Angles, cosines and sines are float32 whatever the model's dtype, including float64: checkpoints are trained with
float32 angles, which differ from exact ones by up to 1e-4 rad at position 4,000.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def rotary_periods(head_dim: int, theta: float) -> Tensor:
    """Compute the positions per radian of each pair: theta^(2i / head_dim). Returns [head_dim / 2] float32."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    return theta**exponent


def rotary_frequencies(head_dim: int, theta: float) -> Tensor:
    """Compute the radians per position of each pair: theta^(-2i / head_dim). Returns [head_dim / 2] float32."""
    return torch.reciprocal(rotary_periods(head_dim, theta))


def llama3_frequencies(
    frequencies: Tensor,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_positions: int,
) -> Tensor:
    """Apply Llama 3.1's context extension: divide slow frequencies by `factor`, keep fast ones, interpolate between.

    A pair is slow if it makes fewer than low_freq_factor turns over original_max_positions, and fast if it makes more
    than high_freq_factor. frequencies: [head_dim / 2] float32. Returns the same shape and dtype.
    """
    wavelength = 2 * math.pi / frequencies
    turns = original_max_positions / wavelength
    keep = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
    ramp = (1 - keep) * frequencies / factor + keep * frequencies
    slow = wavelength > original_max_positions / low_freq_factor
    fast = wavelength < original_max_positions / high_freq_factor
    return torch.where(slow, frequencies / factor, torch.where(fast, frequencies, ramp))


def rotary_tables(
    frequencies: Tensor, max_positions: int, *, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Compute the cosines and sines of every position: (cos, sin), each [max_positions, head_dim / 2] of `dtype`.

    frequencies: [head_dim / 2] float32. The CPU computes the tables, so that every device and rank gets the same ones.
    On the meta device nothing is computed.
    """
    if device.type == "meta":
        empty = torch.empty(max_positions, len(frequencies), dtype=dtype, device=device)
        return empty, empty
    angles = torch.arange(max_positions, dtype=torch.float32)[:, None] * frequencies
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate every head by its token's angles.

    x: [tokens, heads, head_dim], any strides. cos, sin: [tokens, head_dim / 2]; their dtype is that of the arithmetic.
    Returns a new contiguous [tokens, heads, head_dim] of x's dtype.
    """
    wide = x.to(cos.dtype)
    cos, sin = cos[:, None], sin[:, None]
    first, second = wide.chunk(2, dim=-1)
    # Write each half directly into the result: temporaries would slow down a long prefill chunk.
    out = torch.empty(x.shape, dtype=wide.dtype, device=x.device)
    out_first, out_second = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin)
    return out.to(x.dtype)


def yarn_frequencies(
    periods: Tensor,
    *,
    theta: float,
    factor: float,
    beta_fast: float,
    beta_slow: float,
    original_max_positions: int,
    truncate: bool,
) -> Tensor:
    """Apply YaRN (arXiv 2309.00071, section 3.2): keep frequencies that make more than beta_fast turns over the
    original positions, divide those with fewer than beta_slow by `factor`, and interpolate linearly between, by the
    number of the pair.

    periods: [pairs] float32, see rotary_periods. theta: more than 1. truncate: whether the numbers of the first and the
    last pair between are rounded, down and up. Returns radians per position, [pairs] float32.
    """
    pairs = len(periods)

    def pair_of(turns: float) -> float:
        return 2 * pairs * math.log(original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_of(beta_fast), pair_of(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    if low == high:
        high += 0.001
    slow = ((torch.arange(pairs, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    keep = 1 - slow
    return torch.reciprocal(factor * periods) * (1 - keep) + torch.reciprocal(periods) * keep


def yarn_attention_factor(
    factor: float, attention_factor: float | None, mscale: float | None, mscale_all_dim: float | None
) -> float:
    """Return the factor of cosines and sines: attention_factor, or by default 0.1 ln(factor) + 1 (YaRN, section 3.4);
    with both mscales, the quotient of 0.1 mscale ln(factor) + 1 and the same with mscale_all_dim."""

    def scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0

    if attention_factor is not None:
        return attention_factor
    if mscale and mscale_all_dim:
        return scale(mscale) / scale(mscale_all_dim)
    return scale(1.0)


def dynamic_theta(theta: float, rotated: int, *, factor: float, original_max_positions: int, length: int) -> float:
    """Return the theta that dynamic NTK scaling (YaRN, arXiv 2309.00071, section 3.3, as transformers has it) makes of
    another for texts of `length` tokens: theta * (factor * length / original - (factor - 1))^(rotated / (rotated - 2)),
    unchanged up to the original positions.

    rotated: number of a head's elements that rotate, more than 2.
    """
    longer = max(length, original_max_positions) / original_max_positions
    scale: float = (factor * longer - (factor - 1)) ** (rotated / (rotated - 2))
    return theta * scale


def longrope_frequencies(periods: Tensor, factors: Sequence[float]) -> Tensor:
    """Multiply each period by its factor (LongRoPE, arXiv 2402.13753). periods: [pairs] float32, see rotary_periods.
    Returns radians per position, [pairs] float32."""
    return torch.reciprocal(torch.tensor(factors, dtype=torch.float32) * periods)


def query_scales(positions: Tensor, beta: float, original_max_positions: int) -> Tensor:
    """Compute the factors of queries by which Llama 4 and Ministral 3 sharpen attention in long texts:
    1 + beta ln(1 + floor(position / original_max_positions)).

    positions: [tokens] int64. Returns [tokens] float32, as transformers does.
    """
    spans = torch.div(positions, original_max_positions, rounding_mode="floor")
    return 1 + beta * torch.log(1 + spans.to(torch.float32))
