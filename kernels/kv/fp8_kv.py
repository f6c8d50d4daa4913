"""KV of 8 bits of floating point."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from kernels.kv.kv_bits import KV_BITS
from kernels.kv.kv_pool import FP8, KVPool, PoolSizes, to_fp8


class Fp8KV:
    """Numbers of e4m3. Each is rounded by itself when it is written (kernels.kv.kv_pool.write_kv), to at most 448."""

    bits = KV_BITS["fp8"]
    dtype = FP8

    def make_pool(self, exact_pages: int = 0, **sizes: Unpack[PoolSizes]) -> KVPool:
        """See KVFormat.make_pool."""
        if exact_pages:
            raise ValueError("an fp8 pool seals no pages: tokens are rounded when they are written")
        sizes["dtype"] = self.dtype
        return KVPool(**sizes)

    def rounded(self, k: Tensor, v: Tensor, *, drafts: bool = False) -> tuple[Tensor, Tensor]:
        """See KVFormat.rounded."""
        return to_fp8(k).to(k.dtype), to_fp8(v).to(v.dtype)
