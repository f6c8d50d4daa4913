"""KV pool: all pages of one model on one rank, and writes to them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LayerKV:
    """One layer's pages. k, v: [pages, kv_heads, page_size, head_dim]. index: position of the layer in its pool.

    Heads come before slots so that the pool can also be viewed as [pages * kv_heads, 1, page_size, head_dim]: a page
    list per KV head is then an ordinary page list, and one head's page is contiguous memory.
    """

    k: Tensor
    v: Tensor
    index: int = 0


class KVPool:
    """Fixed-address storage for `num_pages` pages in every layer. PageAllocator tracks the owners of pages.

    scratch: index of an optional extra page without an owner; data written there is never used.
    """

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
        self.data = _zeros(shape, dtype, device)
        self.num_pages = num_pages
        self.scratch = num_pages if scratch else None
        self.page_size = page_size
        self._layers = [LayerKV(k, v, index) for index, (k, v) in enumerate(self.data)]

    def layer(self, index: int) -> LayerKV:
        return self._layers[index]

    def clear(self, pages: list[int]) -> None:
        """Zero pages in every layer. On a CPU this also makes the system commit their memory."""
        self.data[:, :, pages] = 0

    @staticmethod
    def bytes_per_token(*, num_layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """Return the KV bytes of one token on this rank, over all layers."""
        return 2 * num_layers * kv_heads * head_dim * dtype.itemsize


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate zeros. On a CPU the system commits memory when it is first written, so an idle pool takes none."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy allocates zeros with calloc; torch writes them.
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)


def write_kv(layer: LayerKV, slots: Tensor, k: Tensor, v: Tensor) -> None:
    """Store keys and values in the pool.

    slots: [tokens] int64, page * page_size + offset, distinct. k, v: [tokens, kv_heads, head_dim].
    """
    page_size = layer.k.shape[2]
    page, offset = slots // page_size, slots % page_size
    layer.k[page, :, offset] = k
    layer.v[page, :, offset] = v
