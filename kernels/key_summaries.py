"""Bounds of the keys of each page, by which queries estimate their attention to a page without reading it."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.kv.kv_pool import KVPool, LayerKV
from kernels.ops import Ops
from kernels.row_sums import row_sum

_BLOCK_BYTES = 64 << 20
"""Largest products of queries with bounds, and largest scores, at a time, unless one query has more. A recomputed
answer of thousands of tokens has hundreds of queries that choose from the pages of a long context at once."""


class KeySummaries:
    """Element-wise minimum and maximum of the keys of each page and KV head (Quest, arXiv 2406.10774, section 3.3),
    kept beside a pool.

    bounds: [layers, 2, pages, kv_heads, head_dim], the minima, and the maxima, in the pool's `wide_dtype`. Pages are
        those of lists: sealed ones have the bounds of the keys before they were rounded.
    """

    def __init__(self, pool: KVPool, ops: Ops) -> None:
        # Both of a page are neighbours in memory, as they are read together, and pages may be anywhere in the pool.
        shape = (pool.num_layers, pool.page_ids, 2, pool.kv_heads, pool.head_dim)
        self.bounds = torch.zeros(shape, dtype=pool.wide_dtype, device=pool.device).transpose(1, 2)
        self._ops = ops
        self._layers: list[tuple[Tensor, Tensor]] = [(low, high) for low, high in self.bounds]

    def update(self, layer: LayerKV, pages: Tensor) -> None:
        """Summarise exact pages anew. pages: [n] int64; one that is named twice is summarised twice."""
        first = layer.num_sealed
        low, high = self._layers[layer.index]
        self._ops.summarise(layer.k, pages - first if first else pages, low[first:], high[first:])

    def seal(self, layer: LayerKV, exact: Tensor, pages: Tensor) -> None:
        """Give sealed pages the bounds of exact ones; see LayerKV.seal."""
        self.bounds[layer.index, :, pages] = self.bounds[layer.index, :, exact + layer.num_sealed]

    def scores(self, layer: LayerKV, q: Tensor, pages: Tensor, first: int, ends: Tensor) -> Tensor:
        """Bound the products of queries with the keys of a layer's pages; see bound_products."""
        return self._ops.bounds(q, pages, *self._layers[layer.index], first, ends)

    def best(self, layer: LayerKV, q: Tensor, pages: Tensor, first: int, ends: Tensor, count: int) -> Tensor:
        """Choose per KV head the pages with the largest scores; see bound_products for the arguments.

        count: at most width. Returns [n, kv_heads, count] int64, indices into each row of `pages`, the best first. Of a
        row with fewer pages to choose from, only that many are valid.
        """
        kv_heads, width = self.bounds.shape[3], pages.shape[1]
        block = max(1, _BLOCK_BYTES // (kv_heads * width * torch.float32.itemsize))
        parts = []
        for start in range(0, len(q), block):
            some = slice(start, start + block)
            scores = self.scores(layer, q[some], pages[some], first, ends[some])
            parts.append(self._ops.best(scores.flatten(0, 1), count).view(-1, kv_heads, count))
        return torch.cat(parts)


def summarise_keys(k: Tensor, pages: Tensor, low: Tensor, high: Tensor) -> None:
    """Summarise pages; see Ops.summarise."""
    low[pages], high[pages] = k[pages].to(low.dtype).aminmax(dim=2)


def bound_products(q: Tensor, pages: Tensor, low: Tensor, high: Tensor, first: int, ends: Tensor) -> Tensor:
    """Bound the products of queries with the keys of pages from above, summed over the heads of a KV head:

        sum over d of max(q_d min_d, q_d max_d)  =  max(q, 0) · max + min(q, 0) · min

    q: [n, heads, head_dim]. pages: [n, width] int64. low, high: [pages, kv_heads, head_dim], see Ops.summarise. first,
    ends [n] int64: the pages before index `first` of a row, and from ends[i] on, get -inf.

    Returns [n, kv_heads, width] float32 (float64 for float64 queries). A sum that is no number counts as 0, and an
    infinite one as the largest finite number: KV of a row that fails in this forward may be no numbers.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(dtype).view(len(q), low.shape[1], -1, q.shape[-1]).transpose(2, 3)
    # [n, 1, kv_heads, head_dim]
    negative, positive = (row_sum(part)[:, None, ..., 0] for part in (grouped.clamp(max=0), grouped.clamp(min=0)))
    block = max(1, _BLOCK_BYTES // (max(1, pages.shape[1]) * low[0].numel() * dtype.itemsize))
    parts = []
    for start in range(0, len(q), block):
        some, listed = slice(start, start + block), pages[start : start + block]
        products = (low[listed] * negative[some]).add_(high[listed] * positive[some])
        parts.append(row_sum(products)[..., 0])  # [block, width, kv_heads]
    scores = torch.cat(parts).transpose(1, 2).contiguous()
    place = torch.arange(pages.shape[1], device=ends.device)
    excluded = (place < first) | (place >= ends[:, None])
    return scores.nan_to_num_().masked_fill_(excluded[:, None], float("-inf"))
