"""Attention that keeps some of its queries, for KV policies that score keys by them."""

from __future__ import annotations

from torch import Tensor

from kernels.attention.base import AttentionBackend, AttentionBatch
from kernels.kv_cache import LayerKV


class QueryCapture:
    """Wrapper of any backend, including another QueryCapture. It copies the queries selected by `capture` out of the
    next forward, in every layer."""

    def __init__(self, inner: AttentionBackend, queries: Tensor) -> None:
        """queries: [layers, places, heads, head_dim], destination of captured queries."""
        self._inner = inner
        self._queries = queries
        self._captured: tuple[Tensor, Tensor] | None = None

    def capture(self, index: Tensor, places: Tensor) -> None:
        """Keep queries of the next forward. index: [n] int64, into its tokens. places: [n] int64, into `queries`."""
        self._captured = index, places

    def capture_nothing(self) -> None:
        """Keep no queries of the next forward."""
        self._captured = None

    @property
    def capturing(self) -> bool:
        """Whether queries of the next forward are kept. Such a forward cannot be replayed from a graph."""
        within = isinstance(self._inner, QueryCapture) and self._inner.capturing
        return within or self._captured is not None

    def plan(self, batch: AttentionBatch) -> None:
        self._inner.plan(batch)

    def run(self, layer: LayerKV, q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """See AttentionBackend.run."""
        if self._captured is not None:
            index, places = self._captured
            self._queries[layer.index, places] = q[index]
            if layer.index == len(self._queries) - 1:
                self._captured = None
        return self._inner.run(layer, q, scale)
