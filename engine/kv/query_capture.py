"""Capture of a forward's queries, for policies that score keys by them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from kernels.attention.base import AttentionBackend, AttentionBatch
from kernels.kv.kv_pool import LayerKV


class SoftmaxTerms(NamedTuple):
    """How a layer's attention weighs products of queries and keys: their scale, and its sinks (see LayerKV)."""

    scale: float
    sinks: Tensor | None


class QueryCapture:
    """Observer that copies queries of the next forward, in every layer.

    terms: of the layers that have run, by index.
    """

    def __init__(self, queries: Tensor) -> None:
        """queries: [layers, places, heads, head_dim], destination of captured queries."""
        self._queries = queries
        self.terms: dict[int, SoftmaxTerms] = {}
        self._next: tuple[Tensor, Tensor] | None = None

    def capture(self, index: Tensor, places: Tensor) -> None:
        """Keep queries of the next forward. index: [n] int64, into its tokens. places: [n] int64, into `queries`."""
        self._next = index, places

    def capture_nothing(self) -> None:
        """Keep no queries of the next forward."""
        self._next = None

    @property
    def due(self) -> bool:
        """See Observer.due."""
        return self._next is not None

    def in_graph(self, rows: int, queries: int, width: int) -> None:
        """See Observer.in_graph. No graph copies queries."""

    def around(self, attention: AttentionBackend) -> AttentionBackend:
        """See Observer.around."""
        assert self._next is not None
        (index, places), self._next = self._next, None
        return _Capturing(attention, self._queries, index, places, self.terms)


class _Capturing:
    """Attention of one forward some of whose queries are kept."""

    def __init__(
        self,
        inner: AttentionBackend,
        queries: Tensor,
        index: Tensor,
        places: Tensor,
        terms: dict[int, SoftmaxTerms],
    ) -> None:
        self._inner, self._terms = inner, terms
        self._queries, self._index, self._places = queries, index, places

    def plan(self, batch: AttentionBatch) -> None:
        self._inner.plan(batch)

    def run(self, layer: LayerKV, q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """See PlannedAttention.run."""
        self._queries[layer.index, self._places] = q[self._index]
        self._terms[layer.index] = SoftmaxTerms(scale, layer.sinks)
        return self._inner.run(layer, q, scale)
