"""Attention to the first and the last tokens of a row as if they were adjacent.

StreamingLLM (arXiv 2309.17453, section 3.2) rotates keys at their positions in the cache, 0 … budget - 1, not in the
text. Rotations compose, and only distances matter: distances to the last tokens do not change, and distances to the
first tokens shrink by the number of positions left out. Keys therefore stay as written, at their positions in the text,
and queries are rotated back by that number of positions before they attend to the first tokens. The two segments are
merged by log-sum-exp, and no cache of un-rotated keys is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from kernels.attention.base import AttentionBackend, AttentionBatch
from kernels.attention.reference_attention import merge_segments
from kernels.kv.kv_pool import LayerKV
from kernels.rope import apply_rope
from kernels.transfer import send, send_all

Merge = Callable[[list[Tensor], list[Tensor]], tuple[Tensor, Tensor]]
"""Signature of merge_segments."""


@dataclass(frozen=True, slots=True)
class _Sink:
    """Queries of rows that leave tokens out. tokens: [n] int64, their indices. cos, sin: [n, head_dim / 2], the
    rotation of each before it attends to the sink."""

    tokens: Tensor
    cos: Tensor
    sin: Tensor


class RelativeAttention:
    """Attention over page lists that start with a sink; if `skipped` > 0, the rest are the last pages of the row."""

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
        """near, sink: backends of the two segments. merge: combines their results. rotary: cosines and sines of all
        positions, each [positions, head_dim / 2].
        """
        self._merge = merge
        self._near, self._far = near, sink
        self._page_size = page_size
        self._sink_pages = sink_pages
        self._rotary = rotary
        self._sink: _Sink | None = None

    def plan(self, batch: AttentionBatch) -> None:
        """batch.pages: [rows, width]. Without a ballot and a window."""
        assert not batch.per_layer
        assert batch.ballot is None
        assert not batch.window, "lists that leave tokens out tell nothing of the distance that a window is"
        skipped = np.array(batch.skipped, dtype=np.int64)
        far = skipped > 0
        self._sink = None
        if not far.any():
            self._near.plan(batch)
            return
        device, sink = batch.pages.device, self._sink_pages
        first = send(torch.from_numpy(np.where(far, sink, 0)), device)
        width = batch.pages.shape[1]
        columns = (torch.arange(width, device=device) + first[:, None]).clamp_(max=width - 1)
        lengths = np.array(batch.kv_lengths) - np.where(far, sink * self._page_size, 0)
        self._near.plan(AttentionBatch(batch.query_lengths, lengths.tolist(), batch.pages.gather(1, columns)))
        # Every query of these rows sees the whole sink, so that each can be a row of its own there.
        queries = np.array(batch.query_lengths)
        rows = np.repeat(np.arange(len(queries)), queries)
        tokens = np.flatnonzero(far[rows])
        token, row, turned = send_all(device, tokens, rows[tokens], skipped[rows[tokens]])
        ones = [1] * len(tokens)
        pages = batch.pages[row, :sink]
        self._far.plan(AttentionBatch(ones, [sink * self._page_size] * len(tokens), pages))
        cos, sin = self._rotary
        self._sink = _Sink(token, cos[turned], -sin[turned])

    def run(self, layer: LayerKV, q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """See AttentionBackend.run."""
        if self._sink is None:
            return self._near.run(layer, q, scale)
        sink = self._sink
        out, total = self._near.run(layer, q, scale)
        turned = apply_rope(q[sink.tokens], sink.cos, sink.sin)
        of_sink, of_sink_total = self._far.run(replace(layer, sinks=None), turned, scale)  # they are in `out`
        out[sink.tokens], total[sink.tokens] = self._merge(
            [out[sink.tokens], of_sink], [total[sink.tokens], of_sink_total]
        )
        return out, total
