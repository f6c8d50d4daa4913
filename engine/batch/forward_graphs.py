"""Forwards captured in graphs at start-up and replayed, since a round of few rows would launch hundreds of kernels one
by one.

A captured forward has a fixed number of rows, and a fixed number of queries of each. Smaller batches are padded.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from engine.batch.graph_inputs import GraphInputs, SlidingRoom
from kernels.attention.base import AttentionBackend, Ballot, GraphAttention, GraphBatch, NoAttention, SharedPrefix
from kernels.attention.shared_reading import largest, pays
from kernels.flashinfer.flashinfer_sizes import Heads
from kernels.kv.kv_pool import KVPool
from kernels.ops import Graphs
from models.batch import ForwardBatch, SlidingKV
from models.decoder import DecoderModel

_STRIDE = 32
"""Limit up to which row counts are powers of two; beyond it, they are its multiples."""

_PREFIXES = 8
"""Largest number of prefixes that a captured forward reads once. Each takes room in the grids of kernels; of more, the
largest are chosen."""

log = logging.getLogger(__name__)


def graph_row_counts(max_rows: int) -> list[int]:
    """Return the numbers of rows for which forwards are captured, rising; the last one is `max_rows`."""
    powers = [2**i for i in range(_STRIDE.bit_length())]
    counts = {*powers, *range(_STRIDE, max_rows, _STRIDE), max_rows}
    return sorted(count for count in counts if count <= max_rows)


def prefix_room(rows: int) -> int:
    """Return the number of prefixes, of at least two rows each, for which a forward that shares pages has room."""
    return min(rows // 2, _PREFIXES)


@dataclass(frozen=True, slots=True)
class _CapturedForward:
    """One graph, its inputs and its output. states: [tokens, hidden_size]."""

    inputs: GraphInputs
    attention: GraphAttention
    sliding: SlidingKV[GraphAttention] | None
    states: Tensor
    replay: Callable[[], None]
    watch: GraphWatch | None


class _Shape(NamedTuple):
    """Shape of a captured forward. shares: whether it reads pages that rows share once."""

    rows: int
    queries: int
    shares: bool

    @property
    def tokens(self) -> int:
        return self.rows * self.queries

    @property
    def prefixes(self) -> int:
        return prefix_room(self.rows) if self.shares else 0


class GraphWatch(Protocol):
    """What an observer does in one captured forward. Its inputs are at fixed addresses."""

    @property
    def ballot(self) -> Ballot | None:
        """Votes that attention counts."""

    def around(self, attention: GraphAttention, batch: GraphBatch) -> GraphAttention:
        """Return attention that is captured in place of `attention` over `batch`, and gives the same results."""

    def copy(self) -> None:
        """Copy in what the next replay learns; nothing if the observer is not due."""


class Observer(Protocol):
    """Learns from the attention of forwards."""

    @property
    def due(self) -> bool:
        """Whether there is something to learn from the next forward."""

    def around(self, attention: AttentionBackend) -> AttentionBackend:
        """Return attention for the next forward, for which the observer is due. It gives the same results as
        `attention`."""

    def in_graph(self, rows: int, queries: int, width: int) -> GraphWatch | None:
        """Prepare for captured forwards of `rows` rows with `queries` queries each, whose lists have `width` pages.
        None: none of these is captured with what the observer does."""


class ForwardGraphs:
    """Captured forwards of one model over one pool with a scratch page, and over that of its sliding layers. All leave
    their results in the same place."""

    def __init__(
        self,
        model: DecoderModel,
        pool: KVPool,
        graphs: Graphs,
        *,
        rows: Iterable[int],
        queries: Iterable[int],
        width: int,
        layers: int = 0,
        shares: bool = False,
        window: int = 0,
        sliding: SlidingRoom | None = None,
        observer: Observer | None = None,
    ) -> None:
        """Capture a forward for each of `rows` with up to each of `queries` per row. Every rank does so at the same
        time.

        width: largest number of pages in a row's list. layers: see GraphInputs. shares: also capture forwards that read
        pages which rows share once, a second one for each shape that may save time by it; the others are as they are
        without. window: see AttentionBatch; not with `shares`. sliding: room for sliding layers; None: the model has
        none. observer: learns from forwards; those that it is due for are replayed only where it is captured too.
        """
        self._model, self._pool, self._graphs = model, pool, graphs
        # Those of the largest shard: all ranks must capture the same shapes, since captured forwards communicate.
        self._heads = Heads(model.max_heads, model.max_kv_heads, model.head_dim)
        self._rows, self._queries = sorted(rows), sorted(queries)
        self._width, self._layers, self._window, self._sliding = width, layers, window, sliding
        self.observer = observer
        max_tokens = self._rows[-1] * self._queries[-1]
        self._states = torch.zeros(max_tokens, model.config.hidden_size, dtype=model.dtype, device=model.device)
        # The largest first, so that the others fit into its memory.
        shapes = [_Shape(count, each, False) for count in self._rows for each in self._queries]
        if shares:
            sharing = [shape._replace(shares=True) for shape in shapes]
            shapes += [shape for shape in sharing if self._pays(shape, _all_shared(shape, width))]
        shapes.sort(key=lambda shape: (shape.tokens, shape.shares), reverse=True)
        with log_capture(f"{len(shapes)} forwards of up to {self._rows[-1]} rows", model.device):
            self._captured = {shape: self._capture(shape) for shape in shapes}

    def forward(self, inputs: ForwardBatch) -> Tensor | None:
        """Same as DecoderModel.forward; None if no graph has room for the inputs."""
        queries = inputs.attention.query_lengths
        if not queries:
            return None
        rows, each = round_up(self._rows, len(queries)), round_up(self._queries, max(queries))
        if rows is None or each is None:
            return None
        shape, prefixes = _Shape(rows, each, False), inputs.attention.prefixes
        if prefixes and (sharing := shape._replace(shares=True)) in self._captured:
            prefixes = largest(prefixes, sharing.prefixes)
            shape = sharing if self._pays(sharing, prefixes) else shape
        graph = self._captured[shape]
        if graph.watch is not None:
            graph.watch.copy()
        elif self.observer is not None and self.observer.due:
            return None
        place = graph.inputs.copy(inputs, np.arange(len(queries)))
        graph.attention.plan(graph.inputs.kv_lengths, prefixes if shape.shares else ())
        if graph.sliding is not None:
            graph.sliding.attention.plan(graph.inputs.sliding_kv_lengths)
        graph.replay()
        return self._model.logits(graph.states[place[inputs.logit_index]])

    def _pays(self, shape: _Shape, prefixes: Sequence[SharedPrefix]) -> bool:
        return pays(prefixes, self._pool.page_size, self._heads, self._pool.itemsize, shape.tokens)

    def _capture(self, shape: _Shape) -> _CapturedForward:
        sizes = {"rows": shape.rows, "queries": shape.queries, "width": self._width}
        inputs = GraphInputs(
            self._pool,
            **sizes,
            prefixes=shape.prefixes,
            layers=self._layers,
            window=self._window,
            sliding=self._sliding,
        )
        watch = self.observer.in_graph(**sizes) if self.observer is not None else None
        rows = inputs.part(0, shape.rows)
        batch = rows.batch
        if watch is not None:
            batch = replace(batch, ballot=watch.ballot)
        attention = capture_attention(self._graphs, self._model, self._pool, batch)
        if watch is not None:
            attention = watch.around(attention, batch)
        sliding = capture_sliding(self._graphs, self._model, self._sliding, rows.sliding)
        states = self._states[: shape.tokens]

        def work() -> None:
            states.copy_(self._model.states(rows.tokens, self._pool, attention, sliding=sliding))

        attention.plan(inputs.kv_lengths)
        if sliding is not None:
            sliding.attention.plan(inputs.sliding_kv_lengths)
        return _CapturedForward(inputs, attention, sliding, states, self._graphs.capture(work), watch)


def capture_attention(graphs: Graphs, model: DecoderModel, pool: KVPool, batch: GraphBatch) -> GraphAttention:
    """Create attention of a captured forward to the layers that keep the KV of all tokens."""
    return graphs.attention(pool.page_size, model.head_dim, batch) if model.num_kv_layers else NoAttention()


def capture_sliding(
    graphs: Graphs, model: DecoderModel, room: SlidingRoom | None, batch: GraphBatch | None
) -> SlidingKV[GraphAttention] | None:
    """Create attention of a captured forward to sliding layers; None: the model has none. batch: see GraphRows."""
    if room is None or batch is None:
        return None
    return SlidingKV(room.pool, graphs.attention(room.pool.page_size, model.head_dim, batch))


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


def _all_shared(shape: _Shape, width: int) -> list[SharedPrefix]:
    """Return the most that rows of a shape can share."""
    return [SharedPrefix(tuple(range(shape.rows)), width)] if shape.rows > 1 else []


def _used(device: torch.device) -> int:
    """Return the bytes of the device's memory in use, by any process."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free
