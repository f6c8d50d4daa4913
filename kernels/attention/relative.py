"""Attention to the first and the last tokens of a row as if nothing stood between them.

StreamingLLM (arXiv 2309.17453, section 3.2) rotates keys at their positions in the cache, 0 … budget - 1, not in the
text. Rotations compose, and only distances matter: against the last tokens nothing changes, and the first ones come
nearer by as many positions as were left out between. So keys stay as they were written, at their positions in the text,
and queries meet the first tokens turned back by that many positions. Two segments, merged by log-sum-exp, and no
cache of un-rotated keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.attention.base import AttentionBackend, AttentionBatch
from kernels.attention.reference_attention import merge_segments
from kernels.kv_cache import LayerKV
from kernels.rope import apply_rope

Merge = Callable[[list[Tensor], list[Tensor]], tuple[Tensor, Tensor]]
"""See merge_segments."""


@dataclass(frozen=True, slots=True)
class _Sink:
    """The queries of rows that leave something out: tokens [n] int64; cos, sin: [n, head_dim / 2], how they turn."""

    tokens: Tensor
    cos: Tensor
    sin: Tensor


class RelativeAttention:
    """Over batches whose page lists are a sink and, where `skipped` says so, the last pages of a row."""

    def __init__(
        self,
        near: AttentionBackend,
        sink: AttentionBackend,
        *,
        page_size: int,
        sink_pages: int,
        rotary: tuple[Tensor, Tensor],
        merge: Merge = merge_segments,
    ) -> None:
        """near, sink: backends for the two segments, which `merge` puts together. rotary: cosines and sines of all
        positions, each [positions, head_dim / 2].
        """
        self._merge = merge
        self._near, self._far = near, sink
        self._page_size = page_size
        self._sink_pages = sink_pages
        self._rotary = rotary
        self._sink: _Sink | None = None

    def plan(self, batch: AttentionBatch) -> None:
        """batch.pages: [rows, width]."""
        skipped = np.array(batch.skipped, dtype=np.int64)
        far = skipped > 0
        self._sink = None
        if not far.any():
            self._near.plan(batch)
            return
        device, sink = batch.pages.device, self._sink_pages
        first = torch.from_numpy(np.where(far, sink, 0)).to(device)
        width = batch.pages.shape[1]
        columns = (torch.arange(width, device=device) + first[:, None]).clamp_(max=width - 1)
        lengths = np.array(batch.kv_lengths) - np.where(far, sink * self._page_size, 0)
        self._near.plan(AttentionBatch(batch.query_lengths, lengths.tolist(), batch.pages.gather(1, columns)))
        # All of the sink stands before every query of these rows: each is a row of its own there.
        queries = np.array(batch.query_lengths)
        rows = np.repeat(np.arange(len(queries)), queries)
        tokens = np.flatnonzero(far[rows])
        turned = torch.from_numpy(skipped[rows[tokens]]).to(device)
        ones = [1] * len(tokens)
        pages = batch.pages[torch.from_numpy(rows[tokens]).to(device), :sink]
        self._far.plan(AttentionBatch(ones, [sink * self._page_size] * len(tokens), pages))
        cos, sin = self._rotary
        self._sink = _Sink(torch.from_numpy(tokens).to(device), cos[turned], -sin[turned])

    def run(self, layer: LayerKV, q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """See AttentionBackend.run."""
        if self._sink is None:
            return self._near.run(layer, q, scale)
        sink = self._sink
        out, total = self._near.run(layer, q, scale)
        turned = apply_rope(q[sink.tokens], sink.cos, sink.sin)
        of_sink, of_sink_total = self._far.run(layer, turned, scale)
        out[sink.tokens], total[sink.tokens] = self._merge(
            [out[sink.tokens], of_sink], [total[sink.tokens], of_sink_total]
        )
        return out, total
