"""Measure how much each KV head looks beyond the first and the most recent tokens, for engine.target_kv.heads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bench.corpus import BenchError
from engine.kv.streaming_heads import HeadShares
from kernels.attention.base import AttentionBackend, AttentionBatch
from kernels.kv.kv_pool import LayerKV
from models.batch import ForwardBatch
from models.decoder import DecoderModel

_PAGE, _CHUNK = 16, 256
_SAMPLES = 64
"""Queries of each passage that are measured, in every layer and head."""


class _Measuring:
    """Attention over one row whose page list is the whole pool, which also adds up weights of sampled queries.

    shares: [layers, kv_heads] float64, sums over queries of the share outside sink and window, which is the mean over a
    KV head's query heads.
    """

    def __init__(self, inner: AttentionBackend, shares: Tensor, sink: int, window: int) -> None:
        self.shares = shares
        self._inner, self._sink, self._window = inner, sink, window
        self._first = 0
        self._sampled = torch.empty(0, dtype=torch.int64)

    def sample(self, first: int, sampled: Tensor) -> None:
        """Measure these positions of the next forward, whose first position is `first`. sampled: [n] int64."""
        self._first, self._sampled = first, sampled

    def plan(self, batch: AttentionBatch) -> None:
        self._inner.plan(batch)

    def run(self, layer: LayerKV, q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """See PlannedAttention.run."""
        if len(self._sampled):
            self.shares[layer.index] += self._outside(layer, q[self._sampled - self._first], scale)
        return self._inner.run(layer, q, scale)

    def _outside(self, layer: LayerKV, q: Tensor, scale: float) -> Tensor:
        """Return the sum of the sampled queries' shares, [kv_heads] float64."""
        length = int(self._sampled.max()) + 1
        keys = layer.k.transpose(0, 1).flatten(1, 2)[:, :length].float()  # [kv_heads, length, head_dim]
        grouped = q.float().view(len(q), len(keys), -1, q.shape[-1])  # [n, kv_heads, group, head_dim]
        scores = torch.einsum("nhgd,hld->nhgl", grouped, keys) * scale
        place, last = torch.arange(length, device=q.device), self._sampled[:, None, None, None]
        total = scores.masked_fill_(place > last, float("-inf")).logsumexp(-1)
        if layer.sinks is not None:
            total = torch.logaddexp(total, layer.sinks.float().view(len(keys), -1))
        weights = torch.exp(scores - total[..., None])
        outside = (place >= self._sink) & (place <= last - self._window)
        return (weights * outside).sum(-1).double().mean(-1).sum(0)


@torch.inference_mode()
def measure(model: DecoderModel, passages: Sequence[Sequence[int]], *, sink: int, window: int) -> HeadShares:
    """Measure the shares of a model on one rank. passages: all of one length. Raises BenchError if that length is not
    more than sink and window, or more than the model has."""
    context = len(passages[0])
    if context <= sink + window:
        raise BenchError(f"{context} tokens of context all belong to a sink of {sink} and a window of {window}")
    if context > model.max_positions:
        raise BenchError(f"{context} tokens of context, but the model has {model.max_positions}")
    if model.config.sliding_layers:
        raise BenchError("a model with sliding layers has no target_kv, for which heads are measured")
    width, device = -(-context // _PAGE), model.device
    pool, pages = model.make_pool(width, _PAGE), torch.arange(width, device=device)[None]
    shares = torch.zeros(model.num_layers, model.kv_heads, dtype=torch.float64, device=device)
    attention = _Measuring(model.ops.attention(_PAGE, model.head_dim), shares, sink, window)
    # Of fewer positions than samples, some count twice.
    sampled = torch.linspace(sink + window, context - 1, _SAMPLES, dtype=torch.float64).long().to(device)
    nothing = torch.empty(0, dtype=torch.int64, device=device)
    for passage in passages:
        tokens = torch.tensor(passage, device=device)
        for first in range(0, context, _CHUNK):
            positions = torch.arange(first, min(first + _CHUNK, context), device=device)
            attention.sample(first, sampled[(sampled >= first) & (sampled < first + _CHUNK)])
            batch = ForwardBatch(
                token_ids=tokens[positions],
                positions=positions,
                slots=positions,
                attention=AttentionBatch([len(positions)], [first + len(positions)], pages),
                logit_index=nothing,
            )
            model.forward(batch, pool, attention)
    found = (shares / (len(sampled) * len(passages))).clamp_(0, 1)
    return HeadShares(model.num_layers, model.kv_heads, sink, window, context, found.tolist())


def describe(found: HeadShares) -> str:
    """Describe the shares of all KV heads, and of the half that would stream."""
    shares = sorted(share for layer in found.shares for share in layer)
    streaming = shares[: len(shares) // 2]
    return (
        f"{len(shares)} KV heads: {shares[0]:.1%} to {shares[-1]:.1%} of attention is outside the first {found.sink} "
        f"and the last {found.window} tokens; of the {len(streaming)} heads that would stream, at most "
        f"{max(streaming, default=0):.1%}"
    )
