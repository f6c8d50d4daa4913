"""KV in the model's dtype."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from kernels.kv.kv_bits import KV_BITS
from kernels.kv.kv_pool import KVPool, PoolSizes


class DenseKV:
    """The numbers that the model computes."""

    bits = KV_BITS["dense"]
    dtype = None

    def make_pool(self, exact_pages: int = 0, **sizes: Unpack[PoolSizes]) -> KVPool:
        """See KVFormat.make_pool."""
        if exact_pages:
            raise ValueError("a dense pool seals no pages: all of them are exact")
        return KVPool(**sizes)

    def rounded(self, k: Tensor, v: Tensor, *, drafts: bool = False) -> tuple[Tensor, Tensor]:
        """See KVFormat.rounded."""
        return k, v
