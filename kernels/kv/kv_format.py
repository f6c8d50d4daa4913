"""The slot of KV formats: how a pool stores keys and values."""

from __future__ import annotations

from typing import Protocol, Unpack

import torch
from torch import Tensor

from kernels.kv.kv_bits import KVBits
from kernels.kv.kv_pool import KVPool, PoolSizes


class KVFormat(Protocol):
    """One format. New tokens are stored by themselves; pages of committed tokens may be sealed in fewer bits."""

    @property
    def bits(self) -> KVBits:
        """Its name and sizes."""

    @property
    def dtype(self) -> torch.dtype | None:
        """Dtype that tokens are written in; None: the model's."""

    def make_pool(self, exact_pages: int = 0, **sizes: Unpack[PoolSizes]) -> KVPool:
        """Allocate a pool. exact_pages: pages that tokens are written to, beside those of `sizes`, which are sealed; 0
        where none are. Raises ValueError for a page size or a number of exact pages that the format does not have."""

    def rounded(self, k: Tensor, v: Tensor, *, drafts: bool = False) -> tuple[Tensor, Tensor]:
        """Return the keys and values of whole pages as they are read once they are stored, and sealed if the format
        seals. k, v: [..., page_size, head_dim]. drafts: as drafts read them."""
