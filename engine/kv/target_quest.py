"""A target that reads only the pages whose keys may matter most (Quest, arXiv 2406.10774; LServe, arXiv 2502.14866).

It is lossy: its text is not that of the dense model. But it is a function of tokens and positions alone, so output with
speculation, preemption, chunks or other rows still equals output without.

Queries of the prompt read everything. The positions after it form groups of `interval`. The first position of a group,
its anchor, chooses per layer and KV head: from the full pages before the anchor, those with the largest bounds. All
queries of the group read the first pages, the chosen ones, and every page from the anchor's on:

    prompt of 9 pages; group of positions 153 … 156, page_size 16, sink 1, budget of 3 pages

    [0] 1 [2] 3 4 [5] 6 7 [8 | 9 (152)

Streaming heads, which look little beyond the sink and the most recent tokens, read only these (LServe, section 3.3).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.batch.row_state import RowState
from engine.config.target_reading import TargetQuestConfig
from engine.kv.page_choice import ListLayout, best_by_bounds, excluded_pages, pages_of
from engine.kv.streaming_heads import read_streaming_heads
from kernels.attention.base import AttentionBackend, AttentionBatch
from kernels.key_summaries import KeySummaries
from kernels.kv_cache import KVPool, LayerKV
from kernels.ragged import Ints, ragged_arange
from kernels.transfer import send_all
from models.llama import Llama

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class _Dense:
    """Queries of prompts, which read everything. tokens: [n] int64, their indices in the batch."""

    tokens: Tensor
    batch: AttentionBatch


@dataclass(frozen=True, slots=True)
class _Groups:
    """Queries after prompts, in groups that read the same pages.

    counts: [groups], queries of each. lasts: [groups], position of its last query. Both on the host. tokens: [queries]
    int64, their indices in the batch. anchors: [new] int64, indices in the batch of the anchors among them, and new:
    [new] int64, the groups of these; width: largest number of full pages before one. rows: [groups] int64, row slots.
    places: [groups] int64, places in the ring of a row's choices. kept: [kept] int64, groups whose choice later
    forwards may need. ends: [groups], on the host and on the device: number of full pages before the anchor.
    """

    counts: Ints
    lasts: Ints
    host_ends: Ints
    tokens: Tensor
    anchors: Tensor
    new: Tensor
    width: int
    rows: Tensor
    places: Tensor
    kept: Tensor
    ends: Tensor


@dataclass(frozen=True, slots=True)
class _Layout:
    """Groups as rows of a pool with one KV head, group by group and head by head.

    queries, lengths: as in AttentionBatch. index: [queries] int64, each one's index in the batch's queries by KV head.
    lists: of each group and KV head. heads: [kv_heads, 1] int64, their numbers.
    """

    queries: list[int]
    lengths: list[int]
    index: Tensor
    lists: ListLayout
    heads: Tensor


class TargetQuestView:
    """View of all KV, whose attention reads less. It tells attention the rows and positions of a forward."""

    per_layer = False

    def __init__(self, page_table: Tensor) -> None:
        self.page_table = page_table
        self.expected: tuple[Ints, Ints] | None = None

    def skipped(self, rows: Ints, contexts: Ints) -> Ints:
        self.expected = rows, contexts
        return contexts * 0

    def leading(self, rows: Ints, contexts: Ints) -> Ints:
        return contexts * 0  # groups of rows with the same pages read different ones

    def pages(self, rows: Tensor, contexts: Tensor, width: int) -> Tensor:
        return self.page_table[rows, :width]


class TargetQuestAttention:
    """Attention of the target, over a batch that lists all KV (TargetQuestView)."""

    def __init__(
        self,
        model: Llama,
        state: RowState,
        pool: KVPool,
        view: TargetQuestView,
        config: TargetQuestConfig,
        max_queries: int,
    ) -> None:
        """max_queries: largest number of queries of a decoding row in a forward."""
        page = state.page_size
        self._state, self._view = state, view
        self._interval, self._count = config.interval, config.budget // page
        self._sink, self._window = -(-config.sink // page), config.window // page
        self._summaries = KeySummaries(pool)
        self._kv_heads, self._best = model.kv_heads, model.ops.best
        # Choices of the latest groups of each row: of those that a forward may begin again after rejected drafts, and
        # the one before.
        self._ring = -(-max_queries // config.interval) + 2
        shape = (model.num_layers, len(state.tokens), self._ring, model.kv_heads, self._count)
        self._chosen = torch.zeros(shape, dtype=torch.int64, device=state.device)
        self._dense_attention = model.ops.attention(page, model.head_dim)
        self._attention: AttentionBackend = model.ops.attention(page, model.head_dim)
        self._streams = _streams(config, model)
        self._written: Tensor
        self._dense: _Dense | None = None
        self._groups: _Groups | None = None
        self._layouts: dict[bytes, _Layout] = {}  # of the planned batch, by which KV heads of a layer stream

    def plan(self, batch: AttentionBatch) -> None:
        assert self._view.expected is not None, "a batch of another view"
        (rows, contexts), self._view.expected = self._view.expected, None
        first, prompt = contexts - 1, self._state.num_prompt[rows]
        queries = np.array(batch.query_lengths)
        device = batch.pages.device
        row_index, columns = send_all(device, *pages_of(first, first + queries, self._state.page_size))
        self._written = batch.pages[row_index, columns]
        starts = queries.cumsum() - queries
        dense = np.clip(prompt - first, 0, queries)
        self._dense, self._groups, self._layouts = None, None, {}
        if (some := np.flatnonzero(dense)).size:
            count = dense[some]
            tokens, members = send_all(device, np.repeat(starts[some], count) + ragged_arange(count), some)
            part = AttentionBatch(count.tolist(), (first + dense)[some].tolist(), batch.pages[members])
            self._dense = _Dense(tokens, part)
            self._dense_attention.plan(part)
        sparse = queries - dense
        if sparse.any():
            token = np.repeat(starts + dense, sparse) + ragged_arange(sparse)
            position = np.repeat(first + dense, sparse) + ragged_arange(sparse)
            self._groups = self._group(rows, np.repeat(np.arange(len(rows)), sparse), prompt, token, position)

    def _group(self, rows: Ints, row: Ints, prompt: Ints, token: Ints, position: Ints) -> _Groups:
        """Group queries. row, token, position: [queries], the row of the batch, index in it, and position of each."""
        number = (position - prompt[row]) // self._interval  # of its group, in its row
        new_group = np.ones(len(row), dtype=bool)
        new_group[1:] = (row[1:] != row[:-1]) | (number[1:] != number[:-1])
        heads = np.flatnonzero(new_group)
        counts = np.diff(np.append(heads, len(row)))
        group_row, group_number = row[heads], number[heads]
        anchor = prompt[group_row] + group_number * self._interval
        new = np.flatnonzero(position[heads] == anchor)
        latest = np.zeros(len(rows), dtype=np.int64)
        np.maximum.at(latest, group_row, group_number)
        kept = new[group_number[new] > latest[group_row[new]] - self._ring]
        ends = anchor // self._state.page_size
        device = self._state.device
        parts = (token, token[heads][new], new, rows[group_row], group_number % self._ring, kept, ends)
        tokens, anchors, new_groups, *others = send_all(device, *parts)
        lasts, width = position[heads + counts - 1], int(ends[new].max(initial=0))
        return _Groups(counts, lasts, ends, tokens, anchors, new_groups, width, *others)

    def run(self, layer: LayerKV, q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """See PlannedAttention.run."""
        self._summaries.update(layer, self._written)
        if self._groups is None:
            return self._dense_attention.run(layer, q, scale)
        out = torch.empty_like(q)
        lse = torch.empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
        if self._dense is not None:
            tokens = self._dense.tokens
            out[tokens], lse[tokens] = self._dense_attention.run(layer, q[tokens], scale)
        self._run_groups(self._groups, layer, q, scale, out, lse)
        return out, lse

    def _choose(self, groups: _Groups, layer: LayerKV, q: Tensor) -> Tensor:
        """Return the chosen pages of each group, [groups, kv_heads, count] int64. Groups that read all candidates need
        none of them."""
        chosen = self._chosen[layer.index, groups.rows, groups.places]
        if groups.width:
            tables = self._state.page_table[groups.rows[groups.new], : groups.width]
            excluded = excluded_pages(groups.ends[groups.new], self._sink, groups.width)[:, None]
            count = min(self._count, groups.width)
            chosen[groups.new, :, :count] = best_by_bounds(
                self._summaries, layer, q[groups.anchors], tables, excluded, count=count, best=self._best
            )
            kept = groups.kept
            self._chosen[layer.index, groups.rows[kept], groups.places[kept]] = chosen[kept]
        return chosen

    def _run_groups(self, groups: _Groups, layer: LayerKV, q: Tensor, scale: float, out: Tensor, lse: Tensor) -> None:
        """Attend with all groups. Each of their KV heads is a row of a pool with one KV head, since it has its own list
        and length."""
        streams = self._streams[layer.index].numpy()
        layout = self._layouts.get(streams.tobytes())
        if layout is None:
            layout = self._layouts[streams.tobytes()] = self._lay_out(groups, streams)
        pages = layout.lists.fill(self._choose(groups, layer, q)) * self._kv_heads + layout.heads
        k, v = (part.view(-1, 1, *part.shape[2:]) for part in (layer.k, layer.v))
        self._attention.plan(AttentionBatch(layout.queries, layout.lengths, pages.flatten(0, 1)))
        size = q.shape[1] // self._kv_heads, q.shape[2]
        mine, sums = self._attention.run(LayerKV(k, v, layer.index), q.reshape(-1, *size)[layout.index], scale)
        out.view(-1, *size)[layout.index] = mine
        lse.view(-1, size[0])[layout.index] = sums

    def _lay_out(self, groups: _Groups, streams: Bools) -> _Layout:
        """Lay out the rows of all layers in which the same KV heads stream. streams: [kv_heads]."""
        kv_heads, device = self._kv_heads, self._state.device
        candidates = np.maximum(groups.host_ends - self._sink, 0)[:, None]
        # [groups, kv_heads], in pages
        skipped = np.maximum(candidates - np.where(streams, self._window, self._count), 0)
        lengths = groups.lasts[:, None] + 1 - skipped * self._state.page_size
        queries = np.repeat(groups.counts, kv_heads)
        first = np.repeat(groups.counts.cumsum() - groups.counts, kv_heads)
        head = np.repeat(np.tile(np.arange(kv_heads), len(groups.counts)), queries)
        place, heads, left_out, chooses = send_all(
            device,
            np.repeat(first, queries) + ragged_arange(queries),
            head,
            skipped.ravel(),
            (~streams & (skipped > 0)).astype(np.int64).ravel(),
        )
        shape = (len(groups.counts), kv_heads, 1)
        lists = ListLayout.make(
            self._state.page_table,
            groups.rows[:, None, None],
            sink=self._sink,
            count=self._count,
            width=-(-int(lengths.max()) // self._state.page_size),
            left_out=left_out.view(shape),
            chooses=chooses.view(shape).bool(),
        )
        return _Layout(
            queries.tolist(),
            lengths.ravel().tolist(),
            groups.tokens[place] * kv_heads + heads,
            lists,
            torch.arange(kv_heads, device=device)[:, None],
        )


def _streams(config: TargetQuestConfig, model: Llama) -> Tensor:
    """Return which of this rank's KV heads stream, [layers, kv_heads] bool, on the host."""
    if config.heads is None:
        return torch.zeros(model.num_layers, model.kv_heads, dtype=torch.bool)
    streams = torch.tensor(read_streaming_heads(config.heads, model.config))
    return streams[:, model.first_kv_head : model.first_kv_head + model.kv_heads]


def make_target_reading(
    config: TargetQuestConfig, model: Llama, state: RowState, pool: KVPool, max_queries: int
) -> tuple[TargetQuestView, TargetQuestAttention]:
    """Make view and attention of a target that reads less than all KV. max_queries: see TargetQuestAttention."""
    view = TargetQuestView(state.page_table)
    return view, TargetQuestAttention(model, state, pool, view, config, max_queries)
