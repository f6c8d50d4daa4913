"""KV pool whose pages are sealed: stored in fewer bits once all their tokens are computed."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor

from kernels.kv.kv_bits import SEALED_GROUP, record_bytes
from kernels.kv.kv_pool import KVPool, LayerKV, SealedKV, zeros
from kernels.kv.sealed_format import SealedFormat


class SealingPool(KVPool):
    """A pool whose first `num_pages` pages hold records of `format`. Tokens are written to further pages, of exact
    numbers, and LayerKV.seal makes records of these."""

    def __init__(
        self,
        format: SealedFormat,
        *,
        num_layers: int,
        num_pages: int,
        exact_pages: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        scratch: bool = False,
    ) -> None:
        """exact_pages: number of pages that tokens are written to. Pages have SEALED_GROUP tokens."""
        super().__init__(
            num_layers=num_layers,
            num_pages=exact_pages,
            page_size=SEALED_GROUP,
            kv_heads=kv_heads,
            head_dim=head_dim,
            dtype=dtype,
            device=device,
            scratch=scratch,
        )
        self.num_pages = self.first_exact = num_pages
        if self.scratch is not None:
            self.scratch += num_pages
        shapes = [(num_layers, num_pages, kv_heads, size) for size in record_bytes(format.name, head_dim)]
        self._records = [zeros(shape, torch.uint8, device) for shape in shapes]  # of keys, and of values
        sealed = [SealedKV(k, v, format) for k, v in zip(*self._records, strict=True)]
        self._layers = [replace(layer, sealed=each) for layer, each in zip(self._layers, sealed, strict=True)]
        self._drafting: SealingPool | None = None
        if format.has_draft_codes:
            self._drafting = copy.copy(self)
            self._drafting._layers = [
                replace(layer, sealed=replace(each, drafts=True))
                for layer, each in zip(self._layers, sealed, strict=True)
            ]

    def drafting(self) -> SealingPool:
        """See KVPool.drafting."""
        return self._drafting or self

    @property
    def bytes_per_page(self) -> int:
        """See KVPool.bytes_per_page."""
        return sum(part[:, 0].numel() for part in self._records)

    def clear(self, pages: list[int]) -> None:
        """See KVPool.clear."""
        for part in self._records:
            part[:, pages] = 0

    def page_bytes(self, pages: Tensor) -> Tensor:
        """See KVPool.page_bytes."""
        return torch.cat([part[:, pages].movedim(1, 0).flatten(1) for part in self._records], 1)

    def read_tokens(self, pages: Tensor, offsets: Tensor) -> Tensor:
        """See KVPool.read_tokens. The numbers are those that attention reads."""
        if not len(pages):
            return super().read_tokens(pages, offsets)
        distinct, places = torch.unique(pages, return_inverse=True)
        return torch.stack([_tokens_of(layer, distinct, places, offsets) for layer in self._layers], 1)


def _tokens_of(layer: LayerKV, pages: Tensor, places: Tensor, offsets: Tensor) -> Tensor:
    """Return the keys and values of tokens in one layer: [n, 2, kv_heads, head_dim]. places: [n], indices into
    `pages`."""
    both = torch.stack([part[0] for part in layer.read(pages[None, None])])  # [2, kv_heads, pages, page_size, head_dim]
    return both[:, :, places, offsets].movedim(2, 0)
