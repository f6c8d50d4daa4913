"""Weights of 8 bits with one scale per row; products on CPUs round their inputs to 8 bits as well."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.weights.matrix import TINY, QuantizedMatrix, regular_groups
from kernels.weights.weight_bits import HEAD_FORMATS


class Int8Format:
    """A row's largest weight becomes ±127."""

    name = "int8"
    head = HEAD_FORMATS[name]

    def spanned(self, features: slice, total: int) -> slice:
        return slice(0, total)

    def quantize(self, weight: Tensor) -> QuantizedMatrix:
        exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
        scales = (exact.abs().amax(1, keepdim=True) / 127).clamp(min=TINY)
        features = weight.shape[1]
        return QuantizedMatrix(
            format=self.name,
            codes=(exact / scales).round().to(torch.int8),
            scales=scales.float(),
            mins=None,
            groups=regular_groups(features, features).to(weight.device),
            group_size=features,
            rounds_inputs=True,
        )
