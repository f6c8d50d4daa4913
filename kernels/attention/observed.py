"""Attention that remembers some of the queries it was asked."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from kernels.attention.base import AttentionBackend, AttentionBatch
from kernels.kv_cache import LayerKV


class ObservedAttention:
    """Any backend; the queries named to `expect` are copied out of the next forward, layer by layer."""

    def __init__(self, inner: AttentionBackend, kept: Tensor) -> None:
        """kept: [layers, places, heads, head_dim], where they go."""
        self._inner = inner
        self._kept = kept
        self._expected: tuple[Tensor, Tensor] | None = None
        self._layer = 0

    def expect(self, queries: Tensor, places: Tensor) -> None:
        """Of the next forward, keep these: [n] int64 index into its tokens, [n] int64 index into `kept`."""
        self._expected = queries, places

    def expect_nothing(self) -> None:
        """Whatever was expected of a forward that failed on its way."""
        self._expected = None

    @property
    def expecting(self) -> bool:
        """Whether queries of the next forward are to be kept."""
        return self._expected is not None

    def plan(self, batch: AttentionBatch) -> None:
        self._layer = 0
        self._inner.plan(batch)

    @overload
    def run(self, layer: LayerKV, q: Tensor, scale: float, *, lse: Literal[False] = False) -> Tensor: ...
    @overload
    def run(self, layer: LayerKV, q: Tensor, scale: float, *, lse: Literal[True]) -> tuple[Tensor, Tensor]: ...
    def run(self, layer: LayerKV, q: Tensor, scale: float, *, lse: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """See AttentionBackend.run."""
        if self._expected is not None:
            queries, places = self._expected
            self._kept[self._layer, places] = q[queries]
            self._layer += 1
            if self._layer == len(self._kept):
                self._expected = None
        return self._inner.run(layer, q, scale, lse=True) if lse else self._inner.run(layer, q, scale)
