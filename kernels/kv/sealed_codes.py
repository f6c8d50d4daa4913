"""Codes of sealed pages, as pools and attention use them."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from kernels.kv.kv_bits import KVBits


class SealedCodes(Protocol):
    """Codes of a format that seals pages. Keys and values: [..., SEALED_GROUP, head_dim]; records: [..., bytes]
    uint8."""

    @property
    def bits(self) -> KVBits:
        """Name and sizes of the format."""

    def seal_keys(self, keys: Tensor) -> Tensor:
        """Return the records of keys."""

    def seal_values(self, values: Tensor) -> Tensor:
        """Return the records of values."""

    def read_keys(self, records: Tensor, head_dim: int, dtype: torch.dtype, *, drafts: bool) -> Tensor:
        """Return the keys of records, computed in float32 and rounded once. drafts: as drafts read them."""

    def read_values(self, records: Tensor, head_dim: int, dtype: torch.dtype, *, drafts: bool) -> Tensor:
        """Return the values of records, likewise."""
