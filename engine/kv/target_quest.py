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
import torch
from torch import Tensor

from engine.batch.row_state import RowState
from engine.config.target_reading import TargetQuestConfig
from engine.kv.page_choice import pages_of
from engine.kv.streaming_heads import read_streaming_heads
from engine.kv.target_lists import GroupAttention, QueryGroups
from kernels.attention.base import AttentionBatch
from kernels.key_summaries import KeySummaries
from kernels.kv.kv_pool import KVPool, LayerKV
from kernels.ragged import Ints, ragged_arange
from kernels.transfer import send_all
from models.decoder import DecoderModel


@dataclass(frozen=True, slots=True)
class _Dense:
    """Queries of prompts, which read everything. tokens: [n] int64, their indices in the batch; None: they are all of
    it."""

    tokens: Tensor | None
    batch: AttentionBatch


@dataclass(frozen=True, slots=True)
class _NewChoices:
    """Choice of the pages that new groups read, of those whose anchor is in this forward and leaves some out.

    groups: [n] int64. anchors: [n] int64, indices of the anchors in the batch. pages: [n, width] int64, the row's
    first ones. ends: [n] int64, how many of them. kept: [kept] int64, which of these choices later forwards may need.
    rows, places: [kept] int64, see QueryGroups.
    """

    groups: Tensor
    anchors: Tensor
    pages: Tensor
    ends: Tensor
    kept: Tensor
    rows: Tensor
    places: Tensor


class TargetQuestView:
    """View of all KV, whose attention reads less. It tells attention the rows and positions of a forward."""

    first_page = 0
    shares = True
    per_layer = False
    sliding = None
    window = 0

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
    """Attention of the target, over a batch that lists all KV (TargetQuestView).

    summaries: of its pool's keys. Each forward summarises the pages to which it writes.
    """

    def __init__(
        self,
        model: DecoderModel,
        state: RowState,
        pool: KVPool,
        view: TargetQuestView,
        config: TargetQuestConfig,
        max_queries: int,
    ) -> None:
        """max_queries: largest number of queries of a decoding row in a forward."""
        page, ops = state.page_size, model.ops
        self._state, self._view = state, view
        self._interval, self._count = config.interval, config.budget // page
        self._sink = -(-config.sink // page)
        self.summaries = KeySummaries(pool, ops)
        self._ring = config.ring(max_queries)
        # Choices of the latest groups of each row: indices into its page table.
        shape = (model.num_kv_layers, len(state.tokens), self._ring, model.kv_heads, self._count)
        self._chosen = torch.zeros(shape, dtype=torch.int32, device=state.device)
        self._dense_attention = ops.attention(page, model.head_dim)
        layers_by_pattern = _layers_by_pattern(config, model)
        self._patterns = [
            GroupAttention(np.array(streams), layers, self._chosen, state, config, ops.attention(page, model.head_dim))
            for streams, layers in layers_by_pattern.items()
        ]
        self._pattern_of = {
            layer: pattern
            for pattern, layers in zip(self._patterns, layers_by_pattern.values(), strict=True)
            for layer in layers
        }
        self._written: Tensor
        self._dense: _Dense | None = None
        self._sparse: Tensor | None = None  # [n] int64, indices in the batch of the queries of groups; None: all of it
        self._choice: _NewChoices | None = None

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
        sparse = queries - dense
        self._dense = self._sparse = self._choice = None
        token = np.repeat(starts + dense, sparse) + ragged_arange(sparse)
        if not len(token):
            self._dense = _Dense(None, batch)
        elif (some := np.flatnonzero(dense)).size:
            count = dense[some]
            tokens = np.repeat(starts[some], count) + ragged_arange(count)
            prompts, members, self._sparse = send_all(device, tokens, some, token)
            part = AttentionBatch(count.tolist(), (first + dense)[some].tolist(), batch.pages[members])
            self._dense = _Dense(prompts, part)
        if self._dense is not None:
            self._dense_attention.plan(self._dense.batch)
        if len(token):
            position = np.repeat(first + dense, sparse) + ragged_arange(sparse)
            self._group(rows, np.repeat(np.arange(len(rows)), sparse), prompt, token, position)

    def _group(self, rows: Ints, row: Ints, prompt: Ints, token: Ints, position: Ints) -> None:
        """Group queries. row, token, position: [queries], the row of the batch, index in it, and position of each."""
        number = (position - prompt[row]) // self._interval  # of its group, in its row
        new_group = np.ones(len(row), dtype=bool)
        new_group[1:] = (row[1:] != row[:-1]) | (number[1:] != number[:-1])
        heads = np.flatnonzero(new_group)
        counts = np.diff(np.append(heads, len(row)))
        group_row, group_number = row[heads], number[heads]
        anchor = prompt[group_row] + group_number * self._interval
        ends, places = anchor // self._state.page_size, group_number % self._ring
        lasts = position[heads + counts - 1]
        row_slots, ring_places = send_all(self._state.device, rows[group_row], places)
        groups = QueryGroups(counts, lasts, ends, row_slots, ring_places)
        new = np.flatnonzero((position[heads] == anchor) & (ends > self._sink + self._count))
        for pattern in self._patterns:
            pattern.plan(groups, late=bool(new.size))
        if not new.size:
            return
        latest = np.zeros(len(rows), dtype=np.int64)
        np.maximum.at(latest, group_row, group_number)
        kept = np.flatnonzero(group_number[new] > latest[group_row[new]] - self._ring)
        slots = rows[group_row[new]]
        parts = (new, token[heads][new], slots, ends[new], kept, slots[kept], places[new][kept])
        new_groups, anchors, new_rows, new_ends, *others = send_all(self._state.device, *parts)
        pages = self._state.page_table[new_rows, : int(ends[new].max())]
        self._choice = _NewChoices(new_groups, anchors, pages, new_ends, *others)

    def run(self, layer: LayerKV, q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """See PlannedAttention.run."""
        self.summaries.update(layer, self._written)
        dense, sparse = self._dense, self._sparse
        if dense is not None and dense.tokens is None:
            return self._dense_attention.run(layer, q, scale)
        pattern = self._pattern_of[layer.index]
        if self._choice is not None and pattern.chooses:
            self._choose(self._choice, pattern, layer, q)
        if dense is None or sparse is None:
            return pattern.run(layer, q, scale)
        out = torch.empty_like(q)
        lse = torch.empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
        out[dense.tokens], lse[dense.tokens] = self._dense_attention.run(layer, q[dense.tokens], scale)
        out[sparse], lse[sparse] = pattern.run(layer, q[sparse], scale)
        return out, lse

    def _choose(self, choice: _NewChoices, pattern: GroupAttention, layer: LayerKV, q: Tensor) -> None:
        """Choose the pages that new groups read in a layer."""
        chosen = self.summaries.best(layer, q[choice.anchors], choice.pages, self._sink, choice.ends, self._count)
        pages = choice.pages[:, None].expand(-1, chosen.shape[1], -1).gather(2, chosen)
        pattern.write(layer, choice.groups, pages)
        self._chosen[layer.index, choice.rows, choice.places] = chosen[choice.kept].int()


def _layers_by_pattern(config: TargetQuestConfig, model: DecoderModel) -> dict[tuple[bool, ...], list[int]]:
    """Return the layers in which the same of this rank's KV heads stream, by [kv_heads], whether each does."""
    if config.heads is None:
        return {(False,) * model.kv_heads: list(range(model.num_kv_layers))}
    layers: dict[tuple[bool, ...], list[int]] = {}
    for layer, streams in enumerate(read_streaming_heads(config.heads, model.config)):
        mine = tuple(streams[model.first_kv_head : model.first_kv_head + model.kv_heads])
        layers.setdefault(mine, []).append(layer)
    return layers


def make_target_reading(
    config: TargetQuestConfig, model: DecoderModel, state: RowState, pool: KVPool, max_queries: int
) -> tuple[TargetQuestView, TargetQuestAttention]:
    """Make view and attention of a target that reads less than all KV. max_queries: see TargetQuestAttention."""
    view = TargetQuestView(state.page_table)
    return view, TargetQuestAttention(model, state, pool, view, config, max_queries)
