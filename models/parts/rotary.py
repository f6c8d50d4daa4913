"""Rotary tables of a model's layers, and the order of a head's elements in which kernels rotate them."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.rope import (
    dynamic_theta,
    llama3_frequencies,
    longrope_frequencies,
    query_scales,
    rotary_frequencies,
    rotary_periods,
    rotary_tables,
    yarn_attention_factor,
    yarn_frequencies,
)
from kernels.weights.matrix import is_finite
from models.files.json_values import ModelError
from models.files.rope_config import RopeConfig

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines of all positions, each [positions, head_dim / 2]."""


def make_rotary(
    rope: RopeConfig | None,
    head_dim: int,
    positions: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    served: int | None = None,
) -> Rotary:
    """Compute the tables of a layer; of pairs that do not rotate, all angles are 0. rope: None: no pair rotates.
    served: see model_frequencies; None: `positions`."""
    pairs = head_dim // 2
    if rope is None:
        return rotary_tables(torch.zeros(pairs), positions, dtype=dtype, device=device)
    frequencies = model_frequencies(rope, rope.num_rotated(head_dim), served or positions)
    fixed = torch.zeros(pairs - len(frequencies))
    cos, sin = rotary_tables(torch.cat([frequencies, fixed]), positions, dtype=dtype, device=device)
    if (factor := rotary_factor(rope)) != 1:
        cos[:, : len(frequencies)] *= factor
        sin[:, : len(frequencies)] *= factor
    if not is_finite(frequencies) or not (cos.is_meta or is_finite(cos[-1:])):
        raise ModelError(
            f"rotary embedding is not finite: see the factors of {rope.kind}, and rope_theta {rope.theta:g}"
        )
    return cos, sin


def model_frequencies(rope: RopeConfig, rotated: int, served: int) -> Tensor:
    """Return the rotary frequencies, [rotated / 2] float32.

    served: number of positions that are served: beyond the original ones, longrope has its long factors from the first
    token on, and dynamic the theta of this length, whatever a request's, so that KV does not depend on what follows it.
    """
    if rope.kind == "dynamic":
        original = rope.original_max_positions
        theta = dynamic_theta(rope.theta, rotated, factor=rope.factor, original_max_positions=original, length=served)
        return rotary_frequencies(rotated, theta)
    periods, frequencies = rotary_periods(rotated, rope.theta), rotary_frequencies(rotated, rope.theta)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        return llama3_frequencies(
            frequencies,
            factor=rope.factor,
            low_freq_factor=rope.low_freq_factor,
            high_freq_factor=rope.high_freq_factor,
            original_max_positions=rope.original_max_positions,
        )
    if rope.kind == "yarn":
        return yarn_frequencies(
            periods,
            theta=rope.theta,
            factor=rope.factor,
            beta_fast=rope.beta_fast,
            beta_slow=rope.beta_slow,
            original_max_positions=rope.original_max_positions,
            truncate=rope.truncate,
        )
    if rope.kind == "longrope":
        factors = rope.long_factors if served > rope.original_max_positions else rope.short_factors
        return longrope_frequencies(periods, factors)
    return frequencies


def rotary_factor(rope: RopeConfig) -> float:
    """Return the factor of cosines and sines."""
    if rope.kind == "yarn":
        return yarn_attention_factor(rope.factor, rope.attention_factor, rope.mscale, rope.mscale_all_dim)
    return rope.attention_factor or 1.0


def make_query_scales(rope: RopeConfig | None, positions: Tensor) -> Tensor | None:
    """Compute the factors of queries at these positions, [tokens] float32; None: there are none."""
    if rope is None or not rope.query_beta:
        return None
    return query_scales(positions, rope.query_beta, rope.original_max_positions)


def kernel_order(rope: RopeConfig | None, head_dim: int) -> Tensor | None:
    """Return the order in which a head's elements have to stand for kernels, which pair element i with element
    i + head_dim / 2: [head_dim] int64; None: as they are. Queries and keys in the same order have the same products.
    """
    if rope is None:
        return None
    rotated = rope.num_rotated(head_dim)
    if rotated == head_dim and not rope.interleaved:
        return None
    own = torch.arange(rotated)
    first, second = (own[0::2], own[1::2]) if rope.interleaved else own.chunk(2)
    fixed = torch.arange(rotated, head_dim).chunk(2) if rotated < head_dim else (own[:0], own[:0])
    return torch.cat([first, fixed[0], second, fixed[1]])
