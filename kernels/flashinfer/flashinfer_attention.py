"""Attention of eager forwards on NVIDIA GPUs by FlashInfer (arXiv 2501.01005); flashinfer_graph.py has that of captured
ones.

Without a GPU, tests run both against FlashInfer's own Python with kernels in torch, and models against a stand-in for
it, tests/support/fake_flashinfer.py. tests/gpu compares FlashInfer's kernels with the oracle.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from kernels.attention.base import AttentionBatch
from kernels.attention.shared_reading import (
    MergePrefixes,
    PrefixSegment,
    first_segment,
    merge_prefixes,
    merge_sinks,
    pays,
    second_segment,
)
from kernels.flashinfer.flashinfer_sizes import Heads, Kernels, eager_float_bytes, eager_int_bytes
from kernels.flashinfer.flashinfer_votes import FlashInferVotes
from kernels.flashinfer.flashinfer_workspace import (
    Call,
    Planned,
    Workspace,
    flat_pages,
    list_pages,
    load_flashinfer,
    to_natural_log,
    to_pinned,
)
from kernels.kv.kv_pool import LayerKV
from kernels.ragged import Ints, offsets, ragged_arange
from kernels.transfer import send, send_all

_IN_FLIGHT = 4  # largest number of plans by which the host is ahead of the device
_MIN_INT_BYTES = 64 << 10  # so that few wrappers must grow

_SHORT = 64
"""Queries times heads per KV head up to which a row is short. FA2 packs these into one dimension and cuts it into tiles
of 16 rows, 64 (a mean of more than 16) or 128 (of more than 64). So no short row makes decoding rows, with 1 to 8, take
tiles of 128, and a longer row fills more than half of one."""

_FA3_QUERIES = 128
"""Queries from which FA3 computes a row on sm_90. It multiplies about twice as fast as FA2, but its tiles are 128
queries of *one* head (192 for head_dim 64), each of which reads the whole context. A row with fewer queries leaves
part of a tile empty, and occupies no more multiprocessors than it has heads; FA2 splits its context instead."""

_Kind = Literal["short", "long", "fa3", "prefix"]


@dataclass(frozen=True, slots=True)
class _Prefixes:
    """Pages that rows share, read once. tokens: [n] int64, the queries of these rows. places: see
    PrefixSegment.places."""

    planned: Planned
    tokens: Tensor
    places: Tensor


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows of a batch that one wrapper attends to. first, end: their queries, in the order in which parts follow. rows:
    [n] int64, their indices among FlashInfer's rows; None: they are all."""

    planned: Planned
    first: int
    end: int
    rows: Tensor | None


class FlashInferAttention:
    """`AttentionBackend` for float16 and bfloat16, head_dim 64, 128 or 256.

    FlashInfer takes one page list for all KV heads. If each head has its own, heads become rows: the pool is also
    [pages * kv_heads, 1, page_size, head_dim] (see LayerKV). If each layer has its own, one plan serves them all, and
    each run reads another array of pages.

    FlashInfer plans for a number of heads, a scale and dtypes, which the first `run` supplies. From then on `plan` does
    all of the host's work: O(rows) for the plan, and no list of pages. The host does not wait for the device, except to
    stay at most a few plans ahead.

    Rows are parted by the tiles that suit them (_SHORT and _FA3_QUERIES), since FlashInfer chooses one tile for all
    rows of a batch by their mean, and splits the KV of none where the others alone give the device enough blocks: a
    chunk of a prompt beside decoding rows would leave those with nearly empty tiles, and one block for a whole context.
    """

    def __init__(self, page_size: int, workspace: Workspace, merge: MergePrefixes = merge_prefixes) -> None:
        """workspace: shared by all attention on this stream. merge: merges what is read of shared pages. Raises
        ImportError if FlashInfer is missing."""
        self._library = load_flashinfer()
        self._merge = merge
        self._page_size = page_size
        self._workspace = workspace
        self._device = workspace.device
        self._batch: AttentionBatch | None = None
        self._call: Call | None = None
        self._wrappers: dict[_Kind, deque[Planned]] = {}
        self._parts: list[_Part] = []
        self._order: Tensor | None = None
        self._prefixes: _Prefixes | None = None
        self._votes: FlashInferVotes | None = None

    def plan(self, batch: AttentionBatch) -> None:
        """See AttentionBackend.plan. The batch has no window."""
        assert not batch.window
        self._batch = batch
        self._parts = []
        self._votes = None
        if batch.ballot is not None:
            queries = np.array(batch.query_lengths, dtype=np.int64)
            lengths = np.array(batch.kv_lengths, dtype=np.int64)
            rows = send_all(self._device, queries.cumsum() - queries, queries, lengths)
            self._votes = FlashInferVotes(batch, batch.ballot, *rows)
        if self._call is not None:
            self._prepare(batch, self._call)

    def run(self, layer: LayerKV, q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """See PlannedAttention.run. Raises ValueError for dtypes and head_dims without FlashInfer kernels."""
        batch = self._batch
        assert batch is not None, "run before plan"
        tokens, heads, head_dim = q.shape
        kv_heads = layer.k.shape[1]
        call = Call(Heads(heads, kv_heads, head_dim), q.dtype, layer.k.dtype, scale)
        if call != self._call or not self._parts:
            call.check()
            self._prepare(batch, call)
            self._call = call
        pool: tuple[Tensor, ...] = (layer.k, layer.v)
        all_q = q
        if batch.per_head:
            q = q.reshape(tokens * kv_heads, heads // kv_heads, head_dim)
            pool = tuple(part.view(-1, 1, *part.shape[2:]) for part in pool)
        if self._order is not None:
            q = q.index_select(0, self._order)
        if batch.late:
            self._list_again(batch, layer)
        # FlashInfer would fill a new output with zeros in every layer.
        out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)
        for part in self._parts:
            mine = slice(part.first, part.end)
            part.planned.run(q[mine], pool, out[mine], lse[mine], layer.index)
        if self._order is not None:
            out, lse = (torch.empty_like(each).index_copy_(0, self._order, each) for each in (out, lse))
        out, lse = out.view(tokens, heads, head_dim), to_natural_log(lse.view(tokens, heads))
        if self._prefixes is not None:
            self._add_prefixes(self._prefixes, pool, all_q, out, lse)
        if layer.sinks is not None:
            merge_sinks(out, lse, layer.sinks, self._merge)
        if self._votes is not None:
            self._votes.count(layer, all_q, scale, lse)
        return out, lse

    def _list_again(self, batch: AttentionBatch, layer: LayerKV) -> None:
        """List the pages of a layer as they are now."""
        pages = flat_pages(batch, batch.pages_of(layer))
        for part in self._parts:
            some = pages if part.rows is None else pages.index_select(0, part.rows)
            part.planned.list_again(layer.index, some)

    def _add_prefixes(self, prefixes: _Prefixes, pool: tuple[Tensor, ...], q: Tensor, out: Tensor, lse: Tensor) -> None:
        """Attend to shared pages, and merge the results into out and lse."""
        q = q.index_select(0, prefixes.tokens)
        of_prefixes, of_prefixes_lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
        prefixes.planned.run(q, pool, of_prefixes, of_prefixes_lse)
        self._merge(out, lse, prefixes.places, of_prefixes, to_natural_log(of_prefixes_lse))

    def _prepare(self, batch: AttentionBatch, call: Call) -> None:
        queries = np.array(batch.query_lengths, dtype=np.int64)
        lengths = np.array(batch.kv_lengths, dtype=np.int64)
        starts, step, heads = queries.cumsum() - queries, 1, call.heads
        lists, self._prefixes = batch.pages, None
        if not batch.per_head and pays(
            batch.prefixes, self._page_size, heads, call.kv_dtype.itemsize, int(queries.sum())
        ):
            segment = first_segment(batch.prefixes, queries)
            self._prefixes = self._plan_prefixes(segment, batch.pages, queries, call)
            lists = second_segment(lists, send(torch.from_numpy(segment.skipped), self._device))
            lengths -= segment.skipped * self._page_size
        if batch.per_head:  # each head of a row is a row; the heads of one token are adjacent in q
            step = heads.kv_heads
            starts = (starts[:, None] * step + np.arange(step)).ravel()
            queries, lengths = queries.repeat(step), lengths.repeat(step)
            heads = heads.as_rows()
        rows = {kind: mine for kind, mine in self._by_kind(queries, heads.group, call).items() if len(mine)}
        by_part = np.concatenate(list(rows.values()))
        counts = queries[by_part]
        order = np.repeat(starts[by_part], counts) + step * ragged_arange(counts)
        in_order = bool((order == np.arange(len(order))).all())
        self._order = None if in_order else send(torch.from_numpy(order), self._device)
        pages, self._parts, first = flat_pages(batch, lists), [], 0
        for kind, mine in rows.items():
            index = None if len(rows) == 1 else send(torch.from_numpy(mine), self._device)
            some = pages if index is None else pages.index_select(-2, index)
            planned = self._plan_part(kind, some, queries[mine], lengths[mine], heads, call)
            self._parts.append(_Part(planned, first, first + int(queries[mine].sum()), index))
            first = self._parts[-1].end

    def _plan_prefixes(self, segment: PrefixSegment, pages: Tensor, queries: Ints, call: Call) -> _Prefixes:
        """Plan for shared pages: a row per prefix, by FA2, which packs heads with queries and splits the KV."""
        rows, tokens, places = send_all(self._device, segment.rows, segment.tokens, segment.places(int(queries.sum())))
        lengths = segment.pages * self._page_size
        shared = pages.index_select(0, rows)
        planned = self._plan_part("prefix", shared, segment.queries, lengths, call.heads, call, causal=False)
        return _Prefixes(planned, tokens, places)

    def _by_kind(self, queries: Ints, group: int, call: Call) -> dict[_Kind, Ints]:
        """Return the rows of each kind, in their order. FA3 has one dtype for queries and KV."""
        short = queries * group <= _SHORT
        hopper = self._workspace.capability == (9, 0) and call.kv_dtype == call.dtype
        fa3 = ~short & (queries >= _FA3_QUERIES) & hopper
        return {"short": np.flatnonzero(short), "long": np.flatnonzero(~short & ~fa3), "fa3": np.flatnonzero(fa3)}

    def _plan_part(
        self,
        kind: _Kind,
        pages: Tensor,
        queries: Ints,
        lengths: Ints,
        heads: Heads,
        call: Call,
        *,
        causal: bool = True,
    ) -> Planned:
        """Plan for rows of one kind. pages: [rows, width], or [layers, rows, width]. causal: False: all queries see all
        of the list."""
        kernels: Kernels = "fa3" if kind == "fa3" else "fa2"
        floats = self._workspace.take(eager_float_bytes(heads, self._workspace.multiprocessors))
        ints = eager_int_bytes(kernels, heads, queries, self._workspace.multiprocessors)
        planned = self._next_wrapper(kind, kernels, floats, max(_MIN_INT_BYTES, 1 << (ints - 1).bit_length()))
        lists = offsets(-(-lengths // self._page_size))
        listed = torch.empty(*pages.shape[:-2], int(lists[-1]) + 1, dtype=torch.int32, device=self._device)
        indptr, last, starts, seq_lens = (
            to_pinned(each, self._device)
            for each in (lists, (lengths - 1) % self._page_size + 1, offsets(queries), lengths)
        )
        planned.listed, planned.indptr = listed, indptr.to(self._device, non_blocking=True)
        list_pages(pages, planned.indptr, listed)
        sizes, listed = (*heads, self._page_size), listed[..., :-1]
        planned.lists, of_first = (listed, listed[0]) if listed.dim() == 2 else (None, listed)
        planned.plan(starts, indptr, of_first, last, *sizes, causal=causal, seq_lens=seq_lens, **call.options)
        return planned

    def _next_wrapper(self, kind: _Kind, kernels: Kernels, floats: Tensor, ints: int) -> Planned:
        """Return a new wrapper, or, if there are enough, the one with the oldest plan."""
        ring = self._wrappers.setdefault(kind, deque())
        if len(ring) < _IN_FLIGHT:
            make = self._library.BatchPrefillWithPagedKVCacheWrapper
            ring.append(Planned(make(floats, "HND", backend=kernels), self._device, floats, ints))
        else:
            ring.rotate(-1)
            ring[-1].provide(floats, ints)
        return ring[-1]
