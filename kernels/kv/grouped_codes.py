"""KV of few bits: how a page of keys and values is stored once all its tokens are committed.

Keys have outliers in certain channels, values have not (KIVI, arXiv 2402.02750): a page's keys are rounded per channel
over its tokens, values per token over the channels of a head. A record holds one page of one KV head:

    codes, scales, minima          x = minimum + scale * code

Scales and minima are float16. They are rounded outward, so that codes reach all values of a page.
"""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from kernels.kv.kv_bits import SEALED_GROUP, KVBits
from kernels.kv.kv_pool import PoolSizes
from kernels.kv.sealing_pool import SealingPool

_LARGEST = torch.finfo(torch.float16).max
_ULP = 2.0**-10
"""More than twice the relative error of rounding to float16."""
_TINY = 2.0**-23
"""More than twice the error of rounding to float16 near zero."""


class GroupedCodes:
    """What formats that seal pages have in common: a scale and a minimum for each group of numbers."""

    bits: KVBits
    dtype = None
    levels: int
    """Steps between the minimum and the maximum of a group."""

    def make_pool(self, exact_pages: int = 0, **sizes: Unpack[PoolSizes]) -> SealingPool:
        """See KVFormat.make_pool."""
        if not exact_pages:
            raise ValueError(f"a pool of {self.bits.name} needs exact pages: tokens are written to these")
        return SealingPool(self, exact_pages=exact_pages, **sizes)

    def rounded(self, k: Tensor, v: Tensor, *, drafts: bool = False) -> tuple[Tensor, Tensor]:
        """See KVFormat.rounded."""
        head_dim = k.shape[-1]
        return (
            self.read_keys(self.seal_keys(k), head_dim, k.dtype, drafts=drafts),
            self.read_values(self.seal_values(v), head_dim, v.dtype, drafts=drafts),
        )

    def seal_keys(self, keys: Tensor) -> Tensor:
        return self._seal(keys, -2)

    def seal_values(self, values: Tensor) -> Tensor:
        return self._seal(values, -1)

    def read_keys(self, records: Tensor, head_dim: int, dtype: torch.dtype, *, drafts: bool) -> Tensor:
        return self._read(records, head_dim, -2, drafts).to(dtype)

    def read_values(self, records: Tensor, head_dim: int, dtype: torch.dtype, *, drafts: bool) -> Tensor:
        return self._read(records, head_dim, -1, drafts).to(dtype)

    def _seal(self, x: Tensor, dim: int) -> Tensor:
        """dim: the one that a group runs along."""
        x = x.float()
        scales, mins = self._scales_and_mins(x, dim)
        codes = self._codes((x - mins.float().unsqueeze(dim)) / scales.float().unsqueeze(dim))
        return torch.cat([codes, scales.view(torch.uint8), mins.view(torch.uint8)], -1)

    def _scales_and_mins(self, x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Return scales and minima in float16. Numbers beyond its range are cut off there."""
        low, high = (each.clamp(-_LARGEST, _LARGEST) for each in x.aminmax(dim=dim))
        mins = (low - low.abs() * _ULP - _TINY).clamp(min=-_LARGEST).half()
        scales = ((high - mins.float()) / self.levels * (1 + _ULP) + _TINY).clamp(max=_LARGEST).half()
        return scales, mins

    def _read(self, records: Tensor, head_dim: int, dim: int, drafts: bool) -> Tensor:
        codes, parameters = records.tensor_split([SEALED_GROUP * head_dim], -1)
        scales, mins = parameters.contiguous().view(torch.float16).float().chunk(2, -1)
        return scales.unsqueeze(dim) * self._steps(codes, head_dim, drafts) + mins.unsqueeze(dim)

    def _codes(self, x: Tensor) -> Tensor:
        """Return the bytes of codes, [..., SEALED_GROUP * head_dim]. x: [..., SEALED_GROUP, head_dim], in steps from
        the minimum."""
        raise NotImplementedError

    def _steps(self, codes: Tensor, head_dim: int, drafts: bool) -> Tensor:
        """Reverse `_codes`, but for rounding: [..., SEALED_GROUP, head_dim] float32."""
        raise NotImplementedError
