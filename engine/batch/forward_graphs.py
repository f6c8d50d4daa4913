"""Forwards captured in graphs at start-up and replayed, since a round of few rows would launch hundreds of kernels one
by one.

A captured forward has a fixed number of rows, and room for a fixed number of queries of each. Smaller batches are
padded with rows of the pool's scratch page, which no request owns.
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

from kernels.attention.base import AttentionBackend, AttentionBatch, GraphShape
from kernels.kv_cache import KVPool
from kernels.ops import Graphs
from models.batch import ForwardBatch
from models.llama import Llama

_STRIDE = 32
"""Limit up to which row counts are powers of two; beyond it, they are its multiples."""

log = logging.getLogger(__name__)


def graph_row_counts(max_rows: int) -> list[int]:
    """Return the numbers of rows for which forwards are captured, rising; the last one is `max_rows`."""
    powers = [2**i for i in range(_STRIDE.bit_length())]
    counts = {*powers, *range(_STRIDE, max_rows, _STRIDE), max_rows}
    return sorted(count for count in counts if count <= max_rows)


class GraphInputs:
    """Inputs of a captured forward, at fixed addresses: for a number of rows, with room for queries of each.

    ids, positions, slots: [rows * queries] int64. attention: planned for the inputs copied last.
    """

    def __init__(self, model: Llama, pool: KVPool, graphs: Graphs, *, rows: int, queries: int, width: int) -> None:
        """width: largest number of pages in a row's list. pool: has a scratch page."""
        assert pool.scratch is not None
        device, page_size = model.device, pool.page_size
        self.rows, self.queries = rows, queries
        # Padding values: token id, position, KV slot.
        padding = torch.tensor([0, 0, pool.scratch * page_size], device=device)
        self._padding = padding[0:1], padding[1:2], padding[2:3]
        self.ids, self.positions, self.slots = (each.repeat(rows * queries) for each in self._padding)
        self._scratch = torch.full((1, 1), pool.scratch, device=device).expand(rows, width)
        shape = GraphShape(rows, rows * queries, width)
        self.attention: AttentionBackend = graphs.attention(page_size, model.head_dim, shape)
        self._whole = AttentionBatch([queries] * rows, [queries] * rows, self._scratch[:, : -(-queries // page_size)])
        self.attention.plan(self._whole)

    @property
    def whole(self) -> ForwardBatch:
        """Return the inputs, with all tokens there is room for."""
        return ForwardBatch(self.ids, self.positions, self.slots, self._whole, self.positions)

    def fits(self, inputs: ForwardBatch) -> bool:
        lengths = inputs.attention.query_lengths
        return 0 < len(lengths) <= self.rows and max(lengths) <= self.queries

    def copy(self, inputs: ForwardBatch) -> None:
        """Copy in the inputs of the next replay. Missing rows become rows of one query that reads only the scratch
        page."""
        new = inputs.token_ids, inputs.positions, inputs.slots
        for fixed, values, padding in zip((self.ids, self.positions, self.slots), new, self._padding, strict=True):
            fixed[: len(values)] = values
            if len(values) < len(fixed):
                fixed[len(values) :] = padding
        batch = inputs.attention
        if missing := self.rows - len(batch.query_lengths):
            ones = [1] * missing
            pages = torch.cat([batch.pages, self._scratch[:missing, : batch.pages.shape[1]]])
            batch = AttentionBatch([*batch.query_lengths, *ones], [*batch.kv_lengths, *ones], pages)
        self.attention.plan(batch)


@dataclass(frozen=True, slots=True)
class _CapturedForward:
    """One graph and its output. states: [tokens, hidden_size]."""

    inputs: GraphInputs
    states: Tensor
    replay: Callable[[], None]


class ForwardGraphs:
    """Captured forwards of one model over one pool with a scratch page. All leave their results in the same place."""

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
        """Capture a forward for each of `rows` with up to each of `queries` per row. Every rank does so at the same
        time.

        width: largest number of pages in a row's list.
        """
        self._model, self._pool, self._graphs = model, pool, graphs
        self._rows, self._queries = sorted(rows), sorted(queries)
        self._width = width
        max_tokens = self._rows[-1] * self._queries[-1]
        self._states = torch.zeros(max_tokens, model.config.hidden_size, dtype=model.dtype, device=model.device)
        # The largest first, so that the others fit into its memory.
        shapes = sorted(((count, each) for count in self._rows for each in self._queries), key=_tokens, reverse=True)
        with log_capture(f"{len(shapes)} forwards of up to {self._rows[-1]} rows", model.device):
            self._captured = {shape: self._capture(*shape) for shape in shapes}

    def forward(self, inputs: ForwardBatch) -> Tensor | None:
        """Same as Llama.forward; None if no graph has room for the inputs."""
        queries = inputs.attention.query_lengths
        if not queries:
            return None
        rows, each = round_up(self._rows, len(queries)), round_up(self._queries, max(queries))
        if rows is None or each is None:
            return None
        graph = self._captured[rows, each]
        graph.inputs.copy(inputs)
        graph.replay()
        return self._model.logits(graph.states[inputs.logit_index])

    def _capture(self, rows: int, each: int) -> _CapturedForward:
        inputs = GraphInputs(self._model, self._pool, self._graphs, rows=rows, queries=each, width=self._width)
        states = self._states[: rows * each]

        def work() -> None:
            states.copy_(self._model.states(inputs.whole, self._pool, inputs.attention))

        return _CapturedForward(inputs, states, self._graphs.capture(work))


@contextmanager
def log_capture(what: str, device: torch.device) -> Iterator[None]:
    """Log the time and the memory that capturing `what` took."""
    began, before = time.perf_counter(), _used(device)
    yield
    seconds = time.perf_counter() - began
    log.info("captured %s in %.1f s, %.2f GB", what, seconds, (_used(device) - before) / 1e9)


def round_up(rising: list[int], wanted: int) -> int | None:
    """Return the first of `rising` that is at least `wanted`."""
    at = bisect_left(rising, wanted)
    return rising[at] if at < len(rising) else None


def _tokens(shape: tuple[int, int]) -> int:
    return shape[0] * shape[1]


def _used(device: torch.device) -> int:
    """Return the bytes of the device's memory in use, by any process."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free
