"""Scores by which a sparse cache chooses the keys to keep."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def snapkv_scores(
    q: Tensor, k: Tensor, scale: float, *, candidates: int, kernel: int, sinks: Tensor | None = None
) -> Tensor:
    """Score a row's earlier keys by the attention of its last queries (SnapKV, arXiv 2404.14469, section 4).

    Each query's softmax over all keys it sees is summed over the queries, averaged over `kernel` neighbouring keys,
    and summed over the query heads that share a KV head.

    q: [queries, heads, head_dim], the row's last positions. k: [kv_heads, length, head_dim]. candidates: number of
    leading keys to score. kernel: odd. sinks: [heads], see kernels.kv.kv_pool.LayerKV. Returns [kv_heads, candidates]
    float32, or float64 for float64 queries.
    """
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    queries, heads, head_dim = q.shape
    kv_heads, length, _ = k.shape
    grouped = (q.to(compute) * scale).transpose(0, 1).reshape(kv_heads, -1, head_dim)  # [kv_heads, group * queries, …]
    scores = (grouped @ k.to(compute).transpose(1, 2)).view(heads, queries, length)
    last = torch.arange(length - queries, length, device=q.device)
    scores.masked_fill_(torch.arange(length, device=q.device) > last[:, None], float("-inf"))
    total = torch.logsumexp(scores, -1, keepdim=True)
    if sinks is not None:
        total = torch.logaddexp(total, sinks.to(compute)[:, None, None])
    votes = torch.exp(scores[..., :candidates] - total).sum(1)  # [heads, candidates]
    votes = F.avg_pool1d(votes[:, None], kernel, stride=1, padding=kernel // 2)[:, 0]
    return votes.view(kv_heads, -1, candidates).sum(1)
