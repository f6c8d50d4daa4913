"""Weights of 4 bits, in groups of features with a scale and a zero point or a minimum each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.weights.matrix import SYMMETRIC_ZERO, TINY, QuantizedMatrix, regular_groups
from kernels.weights.weight_bits import HEAD_FORMATS, INT4_GROUP

LEVELS = 15
"""Largest code."""


@dataclass(frozen=True, slots=True)
class Int4Format:
    """Groups of `group_size` features; the last one of a row may have fewer. symmetric: no zero points: the largest
    weight of a group becomes a code of 0 or 15 around 8. minima: groups have a minimum, any number, in place of a zero
    point, a whole number of steps, which is what checkpoints store. scale_dtype: type that holds the scales and minima:
    float16 is what devices keep, bfloat16 what checkpoints of that type store."""

    group_size: int = INT4_GROUP
    symmetric: bool = False
    minima: bool = False
    scale_dtype: torch.dtype = torch.float16
    name = "int4"
    head = HEAD_FORMATS[name]

    def spanned(self, features: slice, total: int) -> slice:
        size = self.group_size
        return slice(features.start // size * size, min(-(-features.stop // size) * size, total))

    def quantize(self, weight: Tensor) -> QuantizedMatrix:
        rows, features = weight.shape
        size = self.group_size
        padding = weight[:, -1:].expand(-1, -features % size)  # which widens no group
        grouped = torch.cat([weight, padding], 1).float().view(rows, -1, size)
        if self.minima:
            scales, mins = self._scales_and_mins(grouped)
            codes = ((grouped - mins[..., None]) / scales[..., None]).round().clamp_(0, LEVELS)
        else:
            scales, zeros = self.scales_and_zeros(grouped)
            mins = -zeros * scales
            codes = ((grouped / scales[..., None]).round() + zeros[..., None]).clamp_(0, LEVELS)
        return QuantizedMatrix(
            format=self.name,
            codes=codes.to(torch.uint8).view(rows, -1)[:, :features],
            scales=scales,
            mins=None if self.symmetric else mins,
            groups=regular_groups(features, size).to(weight.device),
            group_size=size,
        )

    def scales_and_zeros(self, grouped: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scale of each group and its zero point, a whole number, both [rows, groups] float32. Scales have
        values of `scale_dtype`.

        grouped: [rows, groups, group_size] float32.
        """
        if self.symmetric:
            scales = self._stored(grouped.abs().amax(2) * 2 / LEVELS)
            return scales, torch.full_like(scales, SYMMETRIC_ZERO)
        low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
        scales = self._stored((high - low) / LEVELS)
        return scales, (-low / scales).round().clamp(0, LEVELS)

    def _scales_and_mins(self, grouped: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scale of each group and its minimum, both [rows, groups] float32, with values of `scale_dtype`."""
        low, high = grouped.aminmax(dim=2)
        rounded = low.to(self.scale_dtype).float()
        # The type holds a minimum if rounding moves it by little, beside itself or a step; others stay as they are.
        little = torch.maximum(low.abs() / 2**8, (high - low) / (LEVELS * 2**6))
        mins = torch.where(rounded.isfinite() & ((rounded - low).abs() <= little), rounded, low)
        return self._stored((high - mins) / LEVELS), mins

    def _stored(self, scales: Tensor) -> Tensor:
        """Round scales to the type that holds them; those that it cannot hold stay as they are."""
        rounded = scales.to(self.scale_dtype).float()
        holds = (rounded.isfinite()) & (rounded > torch.finfo(self.scale_dtype).tiny)
        return torch.where(holds, rounded, scales.clamp(min=TINY))
