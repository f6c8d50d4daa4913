"""KV of 8 bits."""

from __future__ import annotations

from torch import Tensor

from kernels.kv.grouped_codes import GroupedCodes
from kernels.kv.kv_bits import KV_BITS, SEALED_GROUP


class Int8KV(GroupedCodes):
    """Codes from 0 to 255, one per byte: [SEALED_GROUP, head_dim]. A number is within half a step of its value."""

    bits = KV_BITS["int8"]
    levels = 255

    def _codes(self, x: Tensor) -> Tensor:
        return x.round().clamp_(0, self.levels).byte().flatten(-2)

    def _steps(self, codes: Tensor, head_dim: int, drafts: bool) -> Tensor:
        return codes.reshape(*codes.shape[:-1], SEALED_GROUP, head_dim).float()
