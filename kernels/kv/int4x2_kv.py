"""KV of 4 bits for drafts and 8 for the target (QuantSpec, arXiv 2502.10424, section 4.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.kv.grouped_codes import GroupedCodes
from kernels.kv.kv_bits import KV_BITS, SEALED_GROUP

_FINER = 16
"""Steps of the lower codes in one of the upper ones."""


class Int4x2KV(GroupedCodes):
    """An upper code from 0 to 15, and a lower one from -8 to 7 for what it leaves, in sixteenths of its step.

    Drafts read the upper codes, within half a step of the value. The target reads both, within half a step of the lower
    codes, or a whole one where 8 had to become 7. In a record all upper codes come first, then all lower ones,
    increased by 8: two tokens per byte, the earlier one in the low half, [SEALED_GROUP / 2, head_dim].
    """

    bits = KV_BITS["int4x2"]
    levels = 15

    def _codes(self, x: Tensor) -> Tensor:
        x = x.clamp(0, self.levels)  # numbers beyond float16's range
        upper = x.round()
        lower = ((x - upper) * _FINER).round().clamp_(-_FINER // 2, _FINER // 2 - 1) + _FINER // 2
        return torch.cat([_join(upper), _join(lower)], -1)

    def _steps(self, codes: Tensor, head_dim: int, drafts: bool) -> Tensor:
        upper, lower = codes.chunk(2, -1)
        steps = _split(upper, head_dim)
        return steps if drafts else steps + (_split(lower, head_dim) - _FINER // 2) / _FINER


def _join(codes: Tensor) -> Tensor:
    """Pack codes below 16, [..., SEALED_GROUP, head_dim], into bytes: [..., SEALED_GROUP * head_dim / 2]."""
    packed = codes.byte()
    return (packed[..., 0::2, :] | packed[..., 1::2, :] << 4).flatten(-2)


def _split(packed: Tensor, head_dim: int) -> Tensor:
    """Reverse `_join`, to float32."""
    both = packed.reshape(*packed.shape[:-1], SEALED_GROUP // 2, head_dim)
    return torch.stack([both & 15, both >> 4], -2).flatten(-3, -2).float()
