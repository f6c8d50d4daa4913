"""KV pool whose pages are sealed: stored in fewer bits once all their tokens are computed."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor

from kernels.kv.kv_pool import KVPool, LayerKV, SealedKV, zeros
from kernels.kv.sealed_codes import SealedCodes


class SealingPool(KVPool):
    """A pool whose first `num_pages` pages hold records of `codes`. Tokens are written to further pages, of exact
    numbers, and LayerKV.seal makes records of these."""

    seals = True

    def __init__(
        self,
        codes: SealedCodes,
        *,
        num_layers: int,
        num_pages: int,
        exact_pages: int,
        page_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        scratch: bool = False,
    ) -> None:
        """exact_pages: number of pages that tokens are written to. Raises ValueError for pages that are not sealed
        groups."""
        if page_size != codes.bits.group:
            raise ValueError(f"pages of format {codes.bits.name} have {codes.bits.group} tokens, not {page_size}")
        super().__init__(
            num_layers=num_layers,
            num_pages=exact_pages,
            page_size=page_size,
            kv_heads=kv_heads,
            head_dim=head_dim,
            dtype=dtype,
            device=device,
            scratch=scratch,
        )
        self.num_pages = self.first_exact = num_pages
        if self.scratch is not None:
            self.scratch += num_pages
        self.page_ids += num_pages
        shapes = [(num_layers, num_pages, kv_heads, size) for size in codes.bits.record_bytes(head_dim)]
        self._records = [zeros(shape, torch.uint8, device) for shape in shapes]  # of keys, and of values
        sealed = [SealedKV(k, v, codes) for k, v in zip(*self._records, strict=True)]
        self._layers = [replace(layer, sealed=each) for layer, each in zip(self._layers, sealed, strict=True)]
        self._drafting: SealingPool | None = None
        if codes.bits.draft_bits is not None:
            self._drafting = copy.copy(self)
            self._drafting._layers = [
                replace(layer, sealed=replace(each, drafts=True))
                for layer, each in zip(self._layers, sealed, strict=True)
            ]

    def drafting(self) -> SealingPool:
        """See KVPool.drafting."""
        return self._drafting or self

    @property
    def nbytes(self) -> int:
        """See KVPool.nbytes."""
        return super().nbytes + sum(part.nbytes for part in self._records)

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

    def fill_random(self, std: float = 1.0) -> None:
        """See KVPool.fill_random. Sealed pages hold the numbers of exact ones, in turn."""
        super().fill_random(std)
        for layer in self._layers:
            assert layer.sealed is not None
            codes = layer.sealed.codes
            for sealed, records in (
                (layer.sealed.k, codes.seal_keys(layer.k)),
                (layer.sealed.v, codes.seal_values(layer.v)),
            ):
                for first in range(0, len(sealed), len(records)):
                    pages = sealed[first : first + len(records)]
                    pages.copy_(records[: len(pages)])


def _tokens_of(layer: LayerKV, pages: Tensor, places: Tensor, offsets: Tensor) -> Tensor:
    """Return the keys and values of tokens in one layer: [n, 2, kv_heads, head_dim]. places: [n], indices into
    `pages`."""
    both = torch.stack([part[0] for part in layer.read(pages[None, None])])  # [2, kv_heads, pages, page_size, head_dim]
    return both[:, :, places, offsets].movedim(2, 0)
