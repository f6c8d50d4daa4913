"""Weights of 8-bit floating point (E4M3: 4 bits of exponent, 3 of mantissa), with one scale per row."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.weights.matrix import TINY, QuantizedMatrix, regular_groups
from kernels.weights.weight_bits import HEAD_FORMATS

LARGEST = torch.finfo(torch.float8_e4m3fn).max
"""Largest value of a code: 448."""


class Fp8Format:
    """A row's largest weight becomes ±448."""

    name = "fp8"
    head = HEAD_FORMATS[name]

    def spanned(self, features: slice, total: int) -> slice:
        return slice(0, total)

    def quantize(self, weight: Tensor) -> QuantizedMatrix:
        wide = weight.float()
        scales = (wide.abs().amax(1, keepdim=True) / LARGEST).clamp(min=TINY)
        features = weight.shape[1]
        return QuantizedMatrix(
            format=self.name,
            codes=(wide / scales).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn),
            scales=scales,
            mins=None,
            groups=regular_groups(features, features).to(weight.device),
            group_size=features,
        )
