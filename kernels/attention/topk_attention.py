"""Attention over each query's own best keys: the upper bound of what a selection of tokens can achieve.

It scores every key to find the best ones, so it serves to measure quality, not to save time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.attention.base import AttentionBatch
from kernels.kv.kv_pool import LayerKV


class TopKAttention:
    """Softmax, per query and KV head, over the `budget` keys to which the KV head's query heads attend most."""

    def __init__(self, page_size: int, budget: int) -> None:
        self._page_size = page_size
        self._budget = budget
        self._batch: AttentionBatch

    def plan(self, batch: AttentionBatch) -> None:
        """batch.pages: [rows, width]; `run` searches these lists, in a window, for the best keys. Without a ballot."""
        assert not batch.per_layer
        assert batch.ballot is None
        self._batch = batch

    def run(self, layer: LayerKV, q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """See AttentionBackend.run."""
        batch = self._batch
        outs, sums = [], []
        rows = zip(torch.split(q, list(batch.query_lengths)), batch.kv_lengths, batch.pages, strict=True)
        for row_q, length, pages in rows:
            out, total = self._row(layer, row_q, scale, length, pages[: -(-length // self._page_size)])
            outs.append(out)
            sums.append(total)
        return torch.cat(outs), torch.cat(sums)

    def _row(self, layer: LayerKV, q: Tensor, scale: float, length: int, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Attend with one row. q: [n, heads, head_dim]. Returns the output, and its log-sum-exp [n, heads]."""
        compute = torch.float64 if q.dtype == torch.float64 else torch.float32
        n, heads, head_dim = q.shape
        # [kv_heads, length, head_dim]
        k, v = (part[0].to(compute) for part in layer.gather(pages[None, None], length))
        kv_heads = len(k)
        grouped = (q.to(compute) * scale).view(n, kv_heads, -1, head_dim).permute(1, 2, 0, 3)
        scores = torch.einsum("hgnd,hld->hgnl", grouped, k)
        seen = torch.arange(length - n, length, device=q.device)[:, None]
        slots = torch.arange(length, device=q.device)
        hidden = slots > seen
        if self._batch.window:
            hidden |= slots <= seen - self._batch.window
            # A weight of zero does not cancel a NaN, and slots that no query sees may hold anything.
            v = v.masked_fill(hidden.all(0)[:, None], 0.0)
        scores.masked_fill_(hidden, float("-inf"))
        sinks = None if layer.sinks is None else layer.sinks.to(compute).view(kv_heads, -1, 1)
        mass = torch.exp(scores - _log_sum(scores, sinks)[..., None]).sum(1)  # [kv_heads, n, length]
        best = mass.topk(min(self._budget, length)).indices
        dropped = torch.ones_like(mass, dtype=torch.bool).scatter_(-1, best, False)
        scores.masked_fill_(dropped[:, None], float("-inf"))
        total = _log_sum(scores, sinks)
        out = torch.einsum("hgnl,hld->nhgd", torch.exp(scores - total[..., None]), v)
        return out.reshape(n, heads, head_dim).to(q.dtype), total.permute(2, 0, 1).reshape(n, heads)


def _log_sum(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Return the log-sum-exp of scores [kv_heads, group, n, length], and of sinks [kv_heads, group, 1] besides."""
    total = scores.logsumexp(-1)
    return total if sinks is None else torch.logaddexp(total, sinks)
