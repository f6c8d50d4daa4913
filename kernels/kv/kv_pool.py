"""KV pool: all pages of one model on one rank, and writes to them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from kernels.kv.sealed_codes import SealedCodes

FP8 = torch.float8_e4m3fn
"""Numbers of a pool in the format fp8, e4m3: 4 bits of exponent, 3 of significand, no infinity."""
_LARGEST = torch.finfo(FP8).max


@dataclass(frozen=True, slots=True)
class SealedKV:
    """The sealed pages of one layer. k, v: [pages, kv_heads, bytes] uint8, records of `codes`. drafts: whether they
    are read as drafts do."""

    k: Tensor
    v: Tensor
    codes: SealedCodes
    drafts: bool = False

    @property
    def kind(self) -> str:
        """See LayerKV.kind."""
        bits = self.codes.bits
        return "upper" if self.drafts and bits.draft_bits is not None else bits.name

    def read(self, index: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Read records: [n, page_size, head_dim] each. index: [n] int64, page * kv_heads + head. like: has the dtype
        and, in its last dimension, the head_dim."""
        keys, values = (part.flatten(0, 1)[index] for part in (self.k, self.v))
        head_dim, dtype = like.shape[-1], like.dtype
        return (
            self.codes.read_keys(keys, head_dim, dtype, drafts=self.drafts),
            self.codes.read_values(values, head_dim, dtype, drafts=self.drafts),
        )


@dataclass(frozen=True, slots=True)
class LayerKV:
    """One layer's pages. k, v: [pages, kv_heads, page_size, head_dim], of exact numbers. index: position of the layer
    in its pool. sealed: pages that come before them: page `i` of a list is sealed.k[i], or, from len(sealed.k) on,
    k[i - len(sealed.k)]. None: there are none. sinks: [heads], float32 or float64 where queries are; each query has one
    more term in its softmax, with this score and a value of zero. None: there are none.

    Heads come before slots so that the pool can also be viewed as [pages * kv_heads, 1, page_size, head_dim]: a page
    list per KV head is then an ordinary page list, and one head's page is contiguous memory.
    """

    k: Tensor
    v: Tensor
    index: int = 0
    sealed: SealedKV | None = None
    sinks: Tensor | None = None

    @property
    def num_sealed(self) -> int:
        return 0 if self.sealed is None else len(self.sealed.k)

    @property
    def kind(self) -> str:
        """How kernels read the layer: `dense`, `fp8`, the name of the format of its sealed pages, or, of these, only
        the upper codes: `upper`."""
        if self.sealed is not None:
            return self.sealed.kind
        return "fp8" if self.k.dtype == FP8 else "dense"

    @property
    def itemsize(self) -> int:
        """Bytes of a number, or of its code where pages are sealed."""
        return 1 if self.sealed is not None else self.k.itemsize

    def one_head(self) -> LayerKV:
        """View the layer as one with a single KV head: page `i` of head `h` becomes page i * kv_heads + h. It has no
        sinks, which differ from head to head."""
        k, v = (part.view(-1, 1, *part.shape[2:]) for part in (self.k, self.v))
        sealed = self.sealed
        if sealed is not None:
            one_head = [part.view(-1, 1, part.shape[2]) for part in (sealed.k, sealed.v)]
            sealed = SealedKV(one_head[0], one_head[1], sealed.codes, sealed.drafts)
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
        self.sealed.k[pages] = self.sealed.codes.seal_keys(self.k[exact])
        self.sealed.v[pages] = self.sealed.codes.seal_values(self.v[exact])

    def write_pages(self, first: int, k: Tensor, v: Tensor) -> None:
        """Store the keys and values of whole pages, of exact numbers, from place `first` in `k` on.

        k, v: [kv_heads, pages * page_size, head_dim].
        """
        page_size = self.k.shape[2]
        for target, part in ((self.k, k), (self.v, v)):
            pages = part.view(len(part), -1, page_size, part.shape[-1]).transpose(0, 1)
            target[first : first + len(pages)].copy_(pages)


class PoolSizes(TypedDict):
    """Sizes of a pool. dtype: of the numbers that the model computes. scratch: see KVPool."""

    num_layers: int
    num_pages: int
    page_size: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    scratch: bool


class KVPool:
    """Fixed-address storage for `num_pages` pages in every layer. PageAllocator tracks the owners of pages.

    Only this folder, and kernels that read a LayerKV, know how bytes are laid out.

    first_exact: index, in page lists, of the first of the pages that tokens are written to. scratch: index of an
    optional extra page without an owner; data written there is never used. page_ids: number of indices of pages.
    """

    first_exact = 0
    seals = False
    """Whether pages are sealed; see kernels.kv.sealing_pool."""

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
        # Keys and values of the pages that tokens are written to. Zeroed so that unwritten slots hold finite numbers: a
        # masked NaN would still poison a product.
        self._data = zeros(shape, dtype, device)
        self.num_layers, self.kv_heads, self.head_dim, self.device = num_layers, kv_heads, head_dim, device
        self.num_pages, self.page_ids = num_pages, num_pages + scratch
        self.scratch = num_pages if scratch else None
        self.page_size = page_size
        self._layers = [LayerKV(k, v, index) for index, (k, v) in enumerate(self._data)]

    def layer(self, index: int) -> LayerKV:
        return self._layers[index]

    def drafting(self) -> KVPool:
        """Return the pool as drafts read it: itself, unless they read fewer bits."""
        return self

    def cache(self, num_pages: int) -> KVPool:
        """Allocate a pool for copies of this one's tokens, of the numbers that they are written in."""
        return KVPool(
            num_layers=self.num_layers,
            num_pages=num_pages,
            page_size=self.page_size,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            dtype=self._data.dtype,
            device=self.device,
            scratch=self.scratch is not None,
        )

    @property
    def wide_dtype(self) -> torch.dtype:
        """Dtype that has all numbers of the exact pages, and that all devices compare and compute in."""
        return torch.bfloat16 if self._data.dtype == FP8 else self._data.dtype

    @property
    def itemsize(self) -> int:
        """See LayerKV.itemsize."""
        return self._layers[0].itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all pages."""
        return self._data.nbytes

    @property
    def bytes_per_page(self) -> int:
        """Bytes of each of the first `num_pages` pages, over all layers."""
        return self._data[:, :, 0].numel() * self._data.itemsize

    def clear(self, pages: list[int]) -> None:
        """Zero pages in every layer. On a CPU this also makes the system commit their memory."""
        self._data[:, :, pages] = 0

    def page_bytes(self, pages: Tensor) -> Tensor:
        """Return what some of the first `num_pages` pages hold: [n, bytes] uint8. pages: [n] int64."""
        return self._data[:, :, pages].movedim(2, 0).flatten(1).view(torch.uint8)

    def read_tokens(self, pages: Tensor, offsets: Tensor) -> Tensor:
        """Copy the keys and values of tokens: [n, layers, 2, kv_heads, head_dim]. pages, offsets: [n] int64, the page
        of each and its place there."""
        return self._data[:, :, pages, :, offsets]

    def write_tokens(self, pages: Tensor, offsets: Tensor, tokens: Tensor) -> None:
        """Store copies of tokens. pages, offsets: [n] int64, as in `read_tokens`; pages that tokens are written to.
        tokens: [n, layers, 2, kv_heads, head_dim], numbers that the pool has."""
        self._data[:, :, pages - self.first_exact if self.first_exact else pages, :, offsets] = tokens

    def fill_random(self, std: float = 1.0) -> None:
        """Fill all pages with normally distributed numbers, for benches."""
        for part in self._data.flatten(0, 1):
            part.copy_(torch.empty_like(part, dtype=self.wide_dtype).normal_(0, std))


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate zeros. On a CPU the system commits memory when it is first written, so an idle pool takes none."""
    if device.type != "cpu" or not math.prod(shape):
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy allocates zeros with calloc; torch writes them.
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)


def to_fp8(x: Tensor) -> Tensor:
    """Round numbers to fp8, at most to its largest. NaN remains NaN."""
    return x.clamp(-_LARGEST, _LARGEST).to(FP8)


def write_kv(layer: LayerKV, slots: Tensor, k: Tensor, v: Tensor) -> None:
    """Store keys and values in the exact pages of a layer.

    slots: [tokens] int64, place in `layer.k` * page_size + offset, distinct. k, v: [tokens, kv_heads, head_dim]. An fp8
    pool rounds them, and cuts them off at its largest number; NaN remains NaN.
    """
    if layer.k.dtype == FP8:
        k, v = to_fp8(k), to_fp8(v)
    page_size = layer.k.shape[2]
    page, offset = slots // page_size, slots % page_size
    layer.k[page, :, offset] = k
    layer.v[page, :, offset] = v
