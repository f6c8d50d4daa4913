"""Rotary position embedding (RoFormer, arXiv 2104.09864).

Half-rotation layout: element i of a head pairs with element i + head_dim / 2.

Angles, cosines and sines are float32 whatever the model's dtype, including float64: checkpoints are trained with
float32 angles, which differ from exact ones by up to 1e-4 rad at position 4,000.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rotary_frequencies(head_dim: int, theta: float) -> Tensor:
    """Compute the radians per position of each pair: theta^(-2i / head_dim). Returns [head_dim / 2] float32."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    return torch.reciprocal(theta**exponent)


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
