"""Forwards that are captured in graphs at the start, and replayed: a round of few rows is hundreds of launches else.

A captured forward has a fixed number of rows, and room for a number of queries of each. Batches are filled up with rows
of the pool's scratch page, which is nobody's.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
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


class Frame:
    """What a captured forward reads, at fixed addresses: for a number of rows, with room for queries of each.

    ids, positions, slots: [rows * queries] int64. attention: planned for what was put in last.
    """

    def __init__(self, model: Llama, pool: KVPool, graphs: Graphs, *, rows: int, queries: int, width: int) -> None:
        """width: most pages that a row's list has. pool: has a scratch page."""
        assert pool.scratch is not None
        device, page_size = model.device, pool.page_size
        self.rows, self.queries = rows, queries
        # What stands where no token does: its id, its position, the slot that its KV goes to.
        nowhere = torch.tensor([0, 0, pool.scratch * page_size], device=device)
        self._nowhere = nowhere[0:1], nowhere[1:2], nowhere[2:3]
        self.ids, self.positions, self.slots = (each.repeat(rows * queries) for each in self._nowhere)
        self._scratch = torch.full((1, 1), pool.scratch, device=device).expand(rows, width)
        self.attention: AttentionBackend = graphs.attention(
            page_size, model.head_dim, Fixed(rows, rows * queries, width)
        )
        self._whole = AttentionBatch([queries] * rows, [queries] * rows, self._scratch[:, : -(-queries // page_size)])
        self.attention.plan(self._whole)

    @property
    def batch(self) -> ForwardBatch:
        """Of all tokens there is room for."""
        return ForwardBatch(self.ids, self.positions, self.slots, self._whole, self.positions)

    def fits(self, batch: ForwardBatch) -> bool:
        lengths = batch.attention.query_lengths
        return 0 < len(lengths) <= self.rows and max(lengths) <= self.queries

    def put(self, batch: ForwardBatch) -> None:
        """What the next replay computes. Rows that are missing become rows of one query each, which sees nothing but
        the scratch page."""
        new = batch.token_ids, batch.positions, batch.slots
        for kept, values, nowhere in zip((self.ids, self.positions, self.slots), new, self._nowhere, strict=True):
            kept[: len(values)] = values
            if len(values) < len(kept):
                kept[len(values) :] = nowhere
        asked = batch.attention
        if missing := self.rows - len(asked.query_lengths):
            ones = [1] * missing
            pages = torch.cat([asked.pages, self._scratch[:missing, : asked.pages.shape[1]]])
            asked = AttentionBatch([*asked.query_lengths, *ones], [*asked.kv_lengths, *ones], pages)
        self.attention.plan(asked)


@dataclass(frozen=True, slots=True)
class _Captured:
    """One graph. states: [tokens, hidden_size]."""

    frame: Frame
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
        self._model, self._pool, self._graphs = model, pool, graphs
        self._rows, self._queries = sorted(rows), sorted(queries)
        self._width = width
        most = self._rows[-1] * self._queries[-1]
        self._states = torch.zeros(most, model.config.hidden_size, dtype=model.dtype, device=model.device)
        # The largest first, so that the others fit into its memory.
        shapes = sorted(((count, each) for count in self._rows for each in self._queries), key=_tokens, reverse=True)
        with reported(f"{len(shapes)} forwards of up to {self._rows[-1]} rows", model.device):
            self._captured = {shape: self._capture(*shape) for shape in shapes}

    def forward(self, batch: ForwardBatch) -> Tensor | None:
        """As Llama.forward; None if no graph has room for the batch."""
        queries = batch.attention.query_lengths
        if not queries:
            return None
        rows, each = at_least(self._rows, len(queries)), at_least(self._queries, max(queries))
        if rows is None or each is None:
            return None
        graph = self._captured[rows, each]
        graph.frame.put(batch)
        graph.replay()
        return self._model.logits(graph.states[batch.logit_index])

    def _capture(self, rows: int, each: int) -> _Captured:
        frame = Frame(self._model, self._pool, self._graphs, rows=rows, queries=each, width=self._width)
        states = self._states[: rows * each]

        def work() -> None:
            states.copy_(self._model.states(frame.batch, self._pool, frame.attention))

        return _Captured(frame, states, self._graphs.capture(work))


@contextmanager
def reported(what: str, device: torch.device) -> Iterator[None]:
    """Log how long it took to capture `what`, and how much memory that cost."""
    began, before = time.perf_counter(), _used(device)
    yield
    seconds = time.perf_counter() - began
    log.info("captured %s in %.1f s, %.2f GB", what, seconds, (_used(device) - before) / 1e9)


def at_least(rising: list[int], wanted: int) -> int | None:
    """The first of them that is no less than `wanted`."""
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
