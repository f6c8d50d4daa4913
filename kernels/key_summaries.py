"""Bounds of the keys of each page, by which queries estimate their attention to a page without reading it."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.kv_cache import KVPool, LayerKV
from kernels.row_sums import row_sum

_BLOCK_BYTES = 64 << 20
"""Largest products of queries with bounds at a time, unless one query has more. A recomputed answer of thousands of
tokens has hundreds of queries that choose from the pages of a long context at once."""


class KeySummaries:
    """Element-wise minimum and maximum of the keys of each page and KV head (Quest, arXiv 2406.10774, section 3.3),
    kept beside a pool.

    bounds: [layers, 2, pages, kv_heads, head_dim] in the pool's dtype: the minima, and the maxima.
    """

    def __init__(self, pool: KVPool) -> None:
        layers, _, pages, kv_heads, _, head_dim = pool.data.shape
        shape = (layers, 2, pages, kv_heads, head_dim)
        self.bounds = torch.zeros(shape, dtype=pool.data.dtype, device=pool.data.device)

    def update(self, layer: LayerKV, pages: Tensor) -> None:
        """Summarise pages anew. pages: [n] int64; one that is named twice is summarised twice."""
        keys = layer.k[pages]  # [n, kv_heads, page_size, head_dim]
        low, high = keys.aminmax(dim=2)
        self.bounds[layer.index, 0, pages] = low
        self.bounds[layer.index, 1, pages] = high

    def scores(self, layer: LayerKV, q: Tensor, pages: Tensor) -> Tensor:
        """Bound the products of queries with the keys of pages from above, summed over the heads of a KV head:

            sum over d of max(q_d min_d, q_d max_d)  =  max(q, 0) · max + min(q, 0) · min

        q: [n, heads, head_dim]. pages: [n, width] int64. Returns [n, kv_heads, width] float32 (float64 for float64
        queries). Other queries and pages change no bit of a score.
        """
        low, high = self.bounds[layer.index]
        dtype = torch.promote_types(q.dtype, torch.float32)
        grouped = q.to(dtype).view(len(q), low.shape[1], -1, q.shape[-1]).transpose(2, 3)
        # [n, 1, kv_heads, head_dim]
        negative, positive = (row_sum(part)[:, None, ..., 0] for part in (grouped.clamp(max=0), grouped.clamp(min=0)))
        block = max(1, _BLOCK_BYTES // (max(1, pages.shape[1]) * low[0].numel() * dtype.itemsize))
        scores = []
        for first in range(0, len(q), block):
            some, listed = slice(first, first + block), pages[first : first + block]
            products = (low[listed] * negative[some]).add_(high[listed] * positive[some])
            scores.append(row_sum(products)[..., 0])  # [block, width, kv_heads]
        return torch.cat(scores).transpose(1, 2).contiguous()
