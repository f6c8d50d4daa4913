"""KV pool: all pages of one model on one rank, and writes to them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.kv.sealed_format import SealedFormat

FP8 = torch.float8_e4m3fn
"""Numbers of a pool in the format fp8, e4m3: 4 bits of exponent, 3 of significand, no infinity."""
_LARGEST = torch.finfo(FP8).max


@dataclass(frozen=True, slots=True)
class SealedKV:
    """The sealed pages of one layer. k, v: [pages, kv_heads, bytes] uint8, records of `format`. drafts: whether they
    are read as drafts do."""

    k: Tensor
    v: Tensor
    format: SealedFormat
    drafts: bool = False

    def read(self, index: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Read records: [n, page_size, head_dim] each. index: [n] int64, page * kv_heads + head. like: has the dtype
        and, in its last dimension, the head_dim."""
        keys, values = (part.flatten(0, 1)[index] for part in (self.k, self.v))
        head_dim, dtype = like.shape[-1], like.dtype
        return (
            self.format.read_keys(keys, head_dim, dtype, drafts=self.drafts),
            self.format.read_values(values, head_dim, dtype, drafts=self.drafts),
        )


@dataclass(frozen=True, slots=True)
class LayerKV:
    """One layer's pages. k, v: [pages, kv_heads, page_size, head_dim], of exact numbers. index: position of the layer
    in its pool. sealed: pages that come before them: page `i` of a list is sealed.k[i], or, from len(sealed.k) on,
    k[i - len(sealed.k)]. None: there are none.

    Heads come before slots so that the pool can also be viewed as [pages * kv_heads, 1, page_size, head_dim]: a page
    list per KV head is then an ordinary page list, and one head's page is contiguous memory.
    """

    k: Tensor
    v: Tensor
    index: int = 0
    sealed: SealedKV | None = None

    @property
    def num_sealed(self) -> int:
        return 0 if self.sealed is None else len(self.sealed.k)

    def one_head(self) -> LayerKV:
        """View the layer as one with a single KV head: page `i` of head `h` becomes page i * kv_heads + h."""
        k, v = (part.view(-1, 1, *part.shape[2:]) for part in (self.k, self.v))
        sealed = self.sealed
        if sealed is not None:
            one_head = [part.view(-1, 1, part.shape[2]) for part in (sealed.k, sealed.v)]
            sealed = SealedKV(one_head[0], one_head[1], sealed.format, sealed.drafts)
        return LayerKV(k, v, self.index, sealed)

    def gather(self, pages: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Copy the keys and values of listed pages: [rows, kv_heads, length, head_dim] each, in the dtype of `k`.

        pages: [rows, kv_heads or 1, width].
        """
        k, v = self.read(pages)
        return k.flatten(2, 3)[:, :, :length], v.flatten(2, 3)[:, :, :length]

    def read(self, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Copy the keys and values of pages: [rows, kv_heads, width, page_size, head_dim] each.

        pages: [rows, kv_heads or 1, width].
        """
        kv_heads = self.k.shape[1]
        heads = torch.arange(kv_heads, device=self.k.device)[:, None]
        index = pages * kv_heads + heads  # one head's page is contiguous memory
        shape = index.shape
        index = index.flatten()
        exact = [part.flatten(0, 1) for part in (self.k, self.v)]
        if self.sealed is None:
            k, v = (part[index] for part in exact)
        else:
            first = self.num_sealed * kv_heads
            is_sealed = (index < first)[:, None, None]
            k, v = (
                torch.where(is_sealed, read, part[(index - first).clamp(min=0)])
                for read, part in zip(self.sealed.read(index.clamp(max=first - 1), self.k), exact, strict=True)
            )
        return k.view(*shape, *k.shape[1:]), v.view(*shape, *v.shape[1:])

    def seal(self, exact: Tensor, pages: Tensor) -> None:
        """Seal pages. exact: [n] int64, places in `k` of what they hold. pages: [n] int64, distinct."""
        assert self.sealed is not None
        self.sealed.k[pages] = self.sealed.format.seal_keys(self.k[exact])
        self.sealed.v[pages] = self.sealed.format.seal_values(self.v[exact])


class KVPool:
    """Fixed-address storage for `num_pages` pages in every layer. PageAllocator tracks the owners of pages.

    data: [layers, 2, pages, kv_heads, page_size, head_dim], keys and values of the pages that tokens are written to.
    first_exact: index, in page lists, of the first of these. scratch: index of an optional extra page without an owner;
    data written there is never used.
    """

    first_exact = 0

    def __init__(
        self,
        *,
        num_layers: int,
        num_pages: int,
        page_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        scratch: bool = False,
    ) -> None:
        shape = (num_layers, 2, num_pages + scratch, kv_heads, page_size, head_dim)
        # Zeroed so that unwritten slots hold finite numbers: a masked NaN would still poison a product.
        self.data = zeros(shape, dtype, device)
        self.num_pages = num_pages
        self.scratch = num_pages if scratch else None
        self.page_size = page_size
        self._layers = [LayerKV(k, v, index) for index, (k, v) in enumerate(self.data)]

    def layer(self, index: int) -> LayerKV:
        return self._layers[index]

    def drafting(self) -> KVPool:
        """Return the pool as drafts read it: itself, unless they read fewer bits."""
        return self

    @property
    def bytes_per_page(self) -> int:
        """Bytes of each of the first `num_pages` pages, over all layers."""
        return self.data[:, :, 0].numel() * self.data.itemsize

    def clear(self, pages: list[int]) -> None:
        """Zero pages in every layer. On a CPU this also makes the system commit their memory."""
        self.data[:, :, pages] = 0

    def page_bytes(self, pages: Tensor) -> Tensor:
        """Return what some of the first `num_pages` pages hold: [n, bytes] uint8. pages: [n] int64."""
        return self.data[:, :, pages].movedim(2, 0).flatten(1).view(torch.uint8)

    def read_tokens(self, pages: Tensor, offsets: Tensor) -> Tensor:
        """Copy the keys and values of tokens: [n, layers, 2, kv_heads, head_dim]. pages, offsets: [n] int64, the page
        of each and its place there."""
        return self.data[:, :, pages, :, offsets]


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate zeros. On a CPU the system commits memory when it is first written, so an idle pool takes none."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy allocates zeros with calloc; torch writes them.
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)


def write_kv(layer: LayerKV, slots: Tensor, k: Tensor, v: Tensor) -> None:
    """Store keys and values in the exact pages of a layer.

    slots: [tokens] int64, place in `layer.k` * page_size + offset, distinct. k, v: [tokens, kv_heads, head_dim]. An fp8
    pool rounds them, and cuts them off at its largest number; NaN remains NaN.
    """
    if layer.k.dtype == FP8:
        k, v = (part.clamp(-_LARGEST, _LARGEST).to(FP8) for part in (k, v))
    page_size = layer.k.shape[2]
    page, offset = slots // page_size, slots % page_size
    layer.k[page, :, offset] = k
    layer.v[page, :, offset] = v
