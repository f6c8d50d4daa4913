"""Attention of captured forwards on NVIDIA GPUs by FlashInfer: plans at fixed addresses, which replays read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kernels.attention.base import GraphBatch, SharedPrefix
from kernels.attention.shared_reading import (
    MergePrefixes,
    PrefixSegment,
    first_segment,
    merge_prefixes,
    merge_sinks,
    second_segment,
)
from kernels.flashinfer.flashinfer_sizes import Heads, captured_plan, captured_ragged_plan, eager_float_bytes
from kernels.flashinfer.flashinfer_votes import FlashInferVotes
from kernels.flashinfer.flashinfer_workspace import (
    Call,
    Planned,
    Workspace,
    flat_pages,
    list_pages,
    load_flashinfer,
    takes_uniform_queries,
    to_natural_log,
    to_pinned,
)
from kernels.kv.kv_pool import LayerKV
from kernels.ragged import offsets
from kernels.transfer import send, send_all


def can_capture(head_dim: int, batch: GraphBatch) -> bool:
    """Whether the batch has no window, and FlashInfer's results are right for rows whose KV is shorter than their
    padded queries.

    FA2 (BatchPrefillWithPagedKVCacheDevice) computes with unsigned integers, so that for L slots and n > L queries
    L - n is huge. Where that shows, in a tile whose first queries see nothing:

    - the number of KV tiles to visit is min(chunk, huge) = all of the row's: more than needed, none too few;
    - the number of KV tiles to visit *without* a mask is min(chunk, huge) / CTA_TILE_KV = L / CTA_TILE_KV. It must be
      0, so n <= CTA_TILE_KV must hold: then L < n is less than a tile;
    - the mask itself, slot + n > L + query, has no difference in it; nor has the first slot, as there is no window.

    Rows this short have one part of KV. A query without slots divides 0 by 0, or averages masked slots: arbitrary, in
    its own output alone. CTA_TILE_KV is at least 16, and from head_dim 128 down at least 32, on all GPUs from sm_80
    on (100 KB of shared memory).
    """
    return not batch.window and batch.queries <= (16 if head_dim > 128 else 32)


class _GraphPrefixes:
    """Shared pages of a captured batch: a row per prefix, and one more for the queries without a prefix, which read one
    page in vain. So every replay has the same number of rows and of queries, wherever these belong.

    tokens: [tokens] int64, all queries of the batch, in the order of these rows. places: see PrefixSegment.places.
    """

    def __init__(self, page_size: int, workspace: Workspace, batch: GraphBatch, call: Call) -> None:
        self._page_size, self._device, self._batch, self._call = page_size, workspace.device, batch, call
        self._rows = rows = batch.prefixes + 1
        self._num_tokens = len(batch.pages) * batch.queries
        self.tokens, self.places = torch.zeros(2, self._num_tokens, dtype=torch.int64, device=self._device)
        self._starts, self._indptr = torch.zeros(2, rows + 1, dtype=torch.int32, device=self._device)
        self._listed = torch.zeros(rows * batch.pages.shape[1] + 1, dtype=torch.int32, device=self._device)
        size = captured_ragged_plan(call.heads, rows, self._num_tokens, workspace.multiprocessors)
        floats = workspace.take(max(size.floats, eager_float_bytes(call.heads, workspace.multiprocessors)))
        wrapper = load_flashinfer().BatchPrefillWithPagedKVCacheWrapper(
            floats,
            "HND",
            use_cuda_graph=True,
            qo_indptr_buf=self._starts,
            paged_kv_indptr_buf=self._indptr,
            paged_kv_indices_buf=self._listed[:-1],
            paged_kv_last_page_len_buf=torch.zeros(rows, dtype=torch.int32, device=self._device),
            backend="fa2",
        )
        self._planned = Planned(wrapper, self._device, floats, size.ints)

    def plan(self, segment: PrefixSegment) -> None:
        places = segment.places(self._num_tokens)
        without = np.flatnonzero(places < 0)
        spare = np.zeros(self._rows - len(segment.rows), dtype=np.int64)
        queries = np.concatenate([segment.queries, spare])
        queries[-1] = len(without)
        pages = np.concatenate([segment.pages, spare + 1])
        lists, lengths = offsets(pages), pages * self._page_size
        starts, indptr, last, seq_lens = (
            to_pinned(each, self._device)
            for each in (offsets(queries), lists, np.full(self._rows, self._page_size), lengths)
        )
        sizes, listed = (*self._call.heads, self._page_size), self._listed[: int(lists[-1])]
        options = {**self._call.options, "causal": False, "seq_lens": seq_lens}
        self._planned.plan(starts, indptr, listed, last, *sizes, **options)
        rows, tokens, where = send_all(
            self._device,
            np.concatenate([segment.rows, spare]),
            np.concatenate([segment.tokens, without]),
            places,
        )
        self.tokens.copy_(tokens)
        self.places.copy_(where)
        list_pages(self._batch.pages.index_select(0, rows), self._indptr, self._listed)

    def run(self, pool: tuple[Tensor, ...], q: Tensor) -> tuple[Tensor, Tensor]:
        """Return the queries' attention, and its log-sum-exp, in the order of `tokens`."""
        q = q.index_select(0, self.tokens)
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
        self._planned.run(q, pool, out, lse)
        return out, to_natural_log(lse)


class FlashInferGraphAttention:
    """`GraphAttention` for float16 and bfloat16, head_dim 64, 128 or 256, by FA2 on every GPU.

    FA3, which FlashInfer prefers on sm_90, does not pack the heads of a group with the queries, takes tiles of 128
    queries, and does not split KV: a row of few queries would read its whole context in one block per query head.

    FlashInfer plans for a number of heads, a scale and dtypes, which the first `run` supplies: a warm-up, since nothing
    can be planned while capturing. Where FlashInfer takes the number of queries per row (takes_uniform_queries), its
    tiles fit them. Before, it assumes one row with nearly all queries of the batch: tiles of 128 rows.
    """

    def __init__(
        self, page_size: int, workspace: Workspace, batch: GraphBatch, merge: MergePrefixes = merge_prefixes
    ) -> None:
        """workspace: shared by all attention on this stream. batch: with room for prefixes only where one list serves
        all heads. merge: merges what is read of shared pages. Raises ImportError if FlashInfer is missing.

        Lists per layer lie in one array, each at a fixed address, which the capture of its layer reads.
        """
        self._library = load_flashinfer()
        self._page_size, self._workspace, self._batch = page_size, workspace, batch
        self._device = device = workspace.device
        self._apart = batch.per_head  # each head of a row is a row
        assert not (self._apart and batch.prefixes)
        self._merge = merge
        self._shared: Sequence[SharedPrefix] = ()
        self._prefixes: _GraphPrefixes | None = None
        self._heads = batch.pages.shape[-2] if self._apart else 1
        self._rows = len(batch.lengths) * self._heads
        self._indptr = torch.zeros(self._rows + 1, dtype=torch.int32, device=device)
        layers, room = batch.pages.shape[: batch.per_layer], self._rows * batch.pages.shape[-1] + 1
        self._listed = torch.zeros(*layers, room, dtype=torch.int32, device=device)
        self._last = torch.zeros(self._rows, dtype=torch.int32, device=device)
        self._votes: FlashInferVotes | None = None
        if batch.ballot is not None:
            counts = torch.full_like(batch.lengths, batch.queries)
            self._votes = FlashInferVotes(batch, batch.ballot, counts.cumsum(0) - counts, counts, batch.lengths)
        self._kv_lengths: Sequence[int] | None = None
        self._call: Call | None = None
        self._planned: Planned | None = None

    def plan(self, kv_lengths: Sequence[int], prefixes: Sequence[SharedPrefix] = ()) -> None:
        """See GraphAttention.plan. Work on the host is O(rows)."""
        self._kv_lengths, self._shared = kv_lengths, prefixes
        if self._planned is not None and self._call is not None:
            self._prepare(self._planned, self._call, kv_lengths)

    def run(self, layer: LayerKV, q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """See GraphAttention.run. Raises ValueError for what FlashInfer has no kernels for."""
        tokens, heads, head_dim = q.shape
        kv_heads = layer.k.shape[1]
        call = Call(Heads(heads, kv_heads, head_dim), q.dtype, layer.k.dtype, scale)
        if self._planned is None:
            assert self._kv_lengths is not None, "run before plan"
            call.check()
            if self._batch.prefixes:
                self._prefixes = _GraphPrefixes(self._page_size, self._workspace, self._batch, call)
            self._planned, self._call = self._make_wrapper(call), call
            self._prepare(self._planned, call, self._kv_lengths)
        assert call == self._call, f"{call}, and the first one {self._call}"
        pool: tuple[Tensor, ...] = (layer.k, layer.v)
        all_q = q
        if self._apart:
            q = self._swap(q, self._batch.queries, kv_heads).reshape(tokens * kv_heads, -1, head_dim)
            pool = tuple(part.view(-1, 1, *part.shape[2:]) for part in pool)
        # FlashInfer would fill a new output with zeros in every layer.
        out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)
        self._planned.run(q, pool, out, lse, layer.index)
        if self._apart:
            out = self._swap(out.view(tokens, heads, head_dim), kv_heads, self._batch.queries)
            lse = self._swap(lse.view(tokens, heads), kv_heads, self._batch.queries)
        out, lse = out.reshape(tokens, heads, head_dim), to_natural_log(lse.reshape(tokens, heads))
        if self._prefixes is not None:
            self._merge(out, lse, self._prefixes.places, *self._prefixes.run(pool, all_q))
        if layer.sinks is not None:
            merge_sinks(out, lse, layer.sinks, self._merge)
        if self._votes is not None:
            self._votes.count(layer, all_q, scale, lse)
        return out, lse

    def _swap(self, x: Tensor, a: int, b: int) -> Tensor:
        """Swap queries and KV heads inside each row: [rows, a, b, …] to [rows, b, a, …]. Queries come first in q, heads
        where they are rows."""
        return x.reshape(len(self._batch.lengths), a, b, -1, *x.shape[2:]).transpose(1, 2)

    def _make_wrapper(self, call: Call) -> Planned:
        heads = call.heads.as_rows() if self._apart else call.heads
        uniform = takes_uniform_queries(self._library)
        size = captured_plan(heads, self._rows, self._batch.queries, self._workspace.multiprocessors, uniform)
        # Not less than eager batches need, so that the memory need not grow after this.
        floats = self._workspace.take(max(size.floats, eager_float_bytes(heads, self._workspace.multiprocessors)))
        indices = self._of_first[:-1]
        if uniform:
            wrapper = self._library.BatchDecodeWithPagedKVCacheWrapper(
                floats,
                "HND",
                use_cuda_graph=True,
                use_tensor_cores=True,
                paged_kv_indptr_buffer=self._indptr,
                paged_kv_indices_buffer=indices,
                paged_kv_last_page_len_buffer=self._last,
                backend="fa2",
            )
        else:
            wrapper = self._library.BatchPrefillWithPagedKVCacheWrapper(
                floats,
                "HND",
                use_cuda_graph=True,
                qo_indptr_buf=torch.zeros_like(self._indptr),
                paged_kv_indptr_buf=self._indptr,
                paged_kv_indices_buf=indices,
                paged_kv_last_page_len_buf=self._last,
                backend="fa2",
            )
        planned = Planned(wrapper, self._device, floats, size.ints)
        planned.lists = self._listed[:, :-1] if self._batch.per_layer else None
        return planned

    @property
    def _of_first(self) -> Tensor:
        """Flat lists of the first layer, or of all."""
        return self._listed[0] if self._batch.per_layer else self._listed

    def _prepare(self, planned: Planned, call: Call, kv_lengths: Sequence[int]) -> None:
        lengths = np.array(kv_lengths, dtype=np.int64).repeat(self._heads)
        queries, pages = self._batch.queries, self._batch.pages
        if self._prefixes is not None:
            segment = first_segment(self._shared, np.full(self._rows, queries))
            self._prefixes.plan(segment)
            pages = second_segment(pages, send(torch.from_numpy(segment.skipped), self._device))
            lengths -= segment.skipped * self._page_size
        lists = offsets(-(-lengths // self._page_size))
        # FlashInfer's decode wrapper refuses lengths below the number of queries, whose first ones would see nothing:
        # they are padding here. FA2 plans by pages alone.
        indptr, last, at_least = (
            to_pinned(each, self._device)
            for each in (lists, (lengths - 1) % self._page_size + 1, np.maximum(lengths, queries))
        )
        listed = self._of_first[: int(lists[-1])]  # the wrapper's own buffer, so that its copy is none
        heads = call.heads.as_rows() if self._apart else call.heads
        sizes, options = (*heads, self._page_size), {**call.options, "seq_lens": at_least}
        if takes_uniform_queries(self._library):
            planned.plan(indptr, listed, last, *sizes, q_len_per_req=queries, **options)
        else:
            starts = to_pinned(np.arange(self._rows + 1) * queries, self._device)
            planned.plan(starts, indptr, listed, last, *sizes, causal=True, **options)
        list_pages(flat_pages(self._batch, pages), self._indptr, self._listed)
