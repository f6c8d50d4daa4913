"""Forwards that are captured in graphs at the start, and replayed: a round of few rows is hundreds of launches else.

A captured forward has a fixed number of rows, and room for a number of queries of each. Batches are filled up with rows
of the pool's scratch page, which is nobody's.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.attention.base import AttentionBackend, AttentionBatch, Fixed
from kernels.kv_cache import KVPool
from kernels.ops import Graphs
from models.batch import ForwardBatch
from models.llama import Llama

_EVERY = 32  # up to here row counts are powers of two, then its multiples

log = logging.getLogger(__name__)


def row_counts(max_rows: int) -> list[int]:
    """For how many rows forwards are captured, rising; the last one is `max_rows`."""
    powers = [2**i for i in range(_EVERY.bit_length())]
    counts = {*powers, *range(_EVERY, max_rows, _EVERY), max_rows}
    return sorted(count for count in counts if count <= max_rows)


@dataclass(frozen=True, slots=True)
class _Captured:
    """One graph. inputs: token ids, positions and slots, [tokens] int64 each; states: [tokens, hidden_size]."""

    inputs: tuple[Tensor, Tensor, Tensor]
    attention: AttentionBackend
    states: Tensor
    replay: Callable[[], None]


class ForwardGraphs:
    """Of one model over one pool that has a scratch page. All graphs leave what they compute in the same place."""

    def __init__(
        self,
        model: Llama,
        pool: KVPool,
        graphs: Graphs,
        *,
        rows: Iterable[int],
        queries: Iterable[int],
        width: int,
    ) -> None:
        """Captures a forward for each of `rows` with up to each of `queries` per row. Every rank does that at the same
        time.

        width: most pages that a row's list has.
        """
        assert pool.scratch is not None
        self._model, self._pool, self._graphs = model, pool, graphs
        self._rows, self._queries = sorted(rows), sorted(queries)
        self._width = width
        self._scratch_lists = torch.full((self._rows[-1], width), pool.scratch, device=model.device)
        # What stands where no token does: its id, its position, the slot that its KV goes to.
        nowhere = torch.tensor([0, 0, pool.scratch * pool.page_size], device=model.device)
        self._nowhere = nowhere[0:1], nowhere[1:2], nowhere[2:3]
        most = self._rows[-1] * self._queries[-1]
        self._states = torch.zeros(most, model.config.hidden_size, dtype=model.dtype, device=model.device)
        began, before = time.perf_counter(), _used(model.device)
        # The largest first, so that the others fit into its memory.
        shapes = sorted(((count, each) for count in self._rows for each in self._queries), key=_tokens, reverse=True)
        self._captured = {shape: self._capture(*shape) for shape in shapes}
        log.info(
            "captured %d forwards of up to %d rows in %.1f s, %.2f GB",
            len(shapes),
            self._rows[-1],
            time.perf_counter() - began,
            (_used(model.device) - before) / 1e9,
        )

    def forward(self, batch: ForwardBatch) -> Tensor | None:
        """As Llama.forward; None if no graph has room for the batch."""
        queries = batch.attention.query_lengths
        count, tokens = len(queries), sum(queries)
        if not count:
            return None
        rows, each = _at_least(self._rows, count), _at_least(self._queries, max(queries))
        if rows is None or each is None:
            return None
        graph = self._captured[rows, each]
        new = batch.token_ids, batch.positions, batch.slots
        for kept, values, nowhere in zip(graph.inputs, new, self._nowhere, strict=True):
            kept[:tokens] = values
            if tokens < len(kept):
                kept[tokens:] = nowhere
        graph.attention.plan(self._filled(batch.attention, rows - count))
        graph.replay()
        return self._model.logits(graph.states[batch.logit_index])

    def _capture(self, rows: int, each: int) -> _Captured:
        tokens, page_size = rows * each, self._pool.page_size
        fixed = Fixed(rows, tokens, self._width)
        attention = self._graphs.attention(page_size, self._model.head_dim, fixed)
        ids, positions, slots = (nowhere.repeat(tokens) for nowhere in self._nowhere)
        states = self._states[:tokens]
        lists = self._scratch_lists[:rows, : -(-each // page_size)]
        whole = AttentionBatch([each] * rows, [each] * rows, lists)
        batch = ForwardBatch(ids, positions, slots, whole, positions)
        attention.plan(whole)

        def work() -> None:
            states.copy_(self._model.states(batch, self._pool, attention))

        return _Captured((ids, positions, slots), attention, states, self._graphs.capture(work))

    def _filled(self, batch: AttentionBatch, missing: int) -> AttentionBatch:
        """With so many more rows, of one query each that sees nothing but the scratch page."""
        if not missing:
            return batch
        ones = [1] * missing
        pages = torch.cat([batch.pages, self._scratch_lists[:missing, : batch.pages.shape[1]]])
        return AttentionBatch([*batch.query_lengths, *ones], [*batch.kv_lengths, *ones], pages)


def _at_least(rising: list[int], wanted: int) -> int | None:
    at = bisect_left(rising, wanted)
    return rising[at] if at < len(rising) else None


def _tokens(shape: tuple[int, int]) -> int:
    return shape[0] * shape[1]


def _used(device: torch.device) -> int:
    """Bytes of the device's memory, whoever holds them."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free
