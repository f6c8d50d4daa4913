"""Inputs of captured forwards, with lists for all layers and KV heads or for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.batch.graph_inputs import GraphInputs, SlidingRoom
from engine.batch.row_state import RowState
from engine.batch.runner import Runner
from engine.batch.view import DenseView
from engine.sampling.sampler import Sampler
from engine.speculation.draft_graphs import DraftGraphs
from kernels.attention.base import AttentionBatch, GraphBatch, SharedPrefix
from kernels.kv.kv_pool import KVPool, LayerKV
from models.batch import ForwardBatch
from parallel.group import Group
from parallel.vocab_shard import VocabShard
from tests.support.engines import TINY, tiny_model
from tests.support.rig import CPU

WIDTH = 6


@pytest.mark.parametrize("layers", [0, 3])
def test_lists_reach_their_rows(layers: int) -> None:
    """Of a smaller batch too, in any order; a part has its rows' lists, of every layer, at fixed addresses."""
    sizes = {"num_layers": 3, "num_pages": 9, "page_size": 4, "kv_heads": 2, "head_dim": 4}
    pool = KVPool(**sizes, dtype=torch.float32, device=CPU, scratch=True)
    inputs = GraphInputs(pool, rows=4, queries=2, width=WIDTH, layers=layers)
    parts = [inputs.part(first, 2).batch for first in (0, 2)]
    for rows, width in (([2, 0, 3], 4), ([1], WIDTH)):
        pages = torch.randint(9, [*[layers] * (layers > 0), len(rows), width])
        tokens = torch.arange(len(rows))
        batch = AttentionBatch([1] * len(rows), [9] * len(rows), pages, per_layer=layers > 0)
        inputs.copy(ForwardBatch(tokens, tokens, tokens, attention=batch, logit_index=tokens), np.array(rows))
        for index, row in enumerate(rows):
            part = parts[row // 2]
            assert part.per_layer == batch.per_layer
            for layer in map(pool.layer, range(3)):
                found = part.pages_of(layer)[row % 2, ..., :width]
                assert torch.equal(found, batch.pages_of(layer)[index])
            assert part.lengths[row % 2] == 9


def pool_of(pages: int, page_size: int) -> KVPool:
    sizes = {"num_layers": 1, "num_pages": pages, "page_size": page_size, "kv_heads": 1, "head_dim": 4}
    return KVPool(**sizes, dtype=torch.float32, device=CPU, scratch=True)


def seen(pages: Tensor, length: int, queries: int, window: int, page_size: int) -> list[list[tuple[int, int]]]:
    """Page and offset of each slot that a row's last queries see."""
    ends = range(length - queries + 1, length + 1)
    slots = [range(max(0, end - window), end) if window else range(end) for end in ends]
    return [[(int(pages[slot // page_size]), slot % page_size) for slot in each] for each in slots]


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("window", [1, 6, 1000])
@pytest.mark.parametrize("slides", [False, True])
def test_queries_see_their_windows(page_size: int, window: int, slides: bool) -> None:
    """In a group beside another one, which has other lists, or in the only one. Lists have no more pages than windows
    need, and at most those of a row."""
    pool, sliding, width = pool_of(90, page_size), pool_of(70, page_size), 40 // page_size
    room = SlidingRoom(sliding, window, width) if slides else None
    inputs = GraphInputs(pool, rows=4, queries=3, width=width, window=0 if slides else window, sliding=room)
    tokens, own, lists = inputs.part(0, 4)
    most = {1: {1: 3, 4: 2}, 6: {1: 8, 4: 3}}.get(window, {}).get(page_size, width)
    windowed = lists if slides else own
    assert windowed is not None
    assert (windowed.window, windowed.pages.shape[1]) == (window, most)
    for queries, lengths, rows in (([3, 1], [40, 17], [2, 0]), ([2, 1, 3], [3, 1, 29], [0, 1, 3]), ([1], [40], [3])):
        count, listed = sum(queries), -(-max(lengths) // page_size)
        full, other = torch.randint(90, (len(rows), listed)), torch.randint(70, (len(rows), listed))
        batch = AttentionBatch(queries, lengths, full, window=0 if slides else window)
        index = torch.arange(count)
        place = inputs.copy(
            ForwardBatch(
                index + 100,
                index + 200,
                index + 300,
                index + 400 if slides else None,
                attention=batch,
                logit_index=index,
                sliding_attention=AttentionBatch(queries, lengths, other, window=window) if slides else None,
            ),
            np.array(rows),
        )
        assert tokens.sliding_slots is not None or not slides
        for pages, part, kv_lengths, slots, scratch, first in (
            (full, own, inputs.kv_lengths, tokens.slots, 90, 300),
            (other, lists, inputs.sliding_kv_lengths, tokens.sliding_slots, 70, 400),
        ):
            if part is None or slots is None:
                continue
            assert slots[place].tolist() == list(range(first, first + count))
            padding = torch.ones(12, dtype=torch.bool).index_fill_(0, place, False)
            assert (slots[padding] == scratch * page_size).all()
            assert part.lengths.tolist() == kv_lengths
            for at, row in enumerate(rows):
                found = seen(part.pages[row], kv_lengths[row], queries[at], part.window, page_size)
                assert found == seen(pages[at], lengths[at], queries[at], part.window, page_size)
            assert all(kv_lengths[row] == 1 for row in {*range(4)} - {*rows})
        assert tokens.token_ids[place].tolist() == list(range(100, 100 + count))


def test_lists_per_layer_have_no_prefixes() -> None:
    pages, prefix = torch.randint(9, [2, 2, 3]), SharedPrefix((0, 1), 1)
    with pytest.raises(AssertionError):
        AttentionBatch([1, 1], [9, 9], pages, per_layer=True, prefixes=[prefix])
    with pytest.raises(AssertionError):
        GraphBatch(1, pages, torch.ones(2, dtype=torch.int64), prefixes=1, per_layer=True)


class _Attention:
    def plan(self, kv_lengths: Sequence[int], prefixes: Sequence[SharedPrefix] = ()) -> None:
        self.lengths = kv_lengths

    def run(self, layer: LayerKV, q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        raise AssertionError


class _Graphs:
    """Keeps the batches of captures, and runs none."""

    def __init__(self) -> None:
        self.batches: list[GraphBatch] = []

    def attention(self, page_size: int, head_dim: int, batch: GraphBatch) -> _Attention:
        self.batches.append(batch)
        return _Attention()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        return work

    def release(self) -> None:
        """Nothing is held."""


def test_drafts_read_lists_per_layer() -> None:
    """All steps, each its own."""
    model = tiny_model()
    state = RowState(max_rows=2, max_model_len=24, page_size=4, device=CPU, ops=model.ops)
    sizes = {"num_layers": model.num_layers, "num_pages": 9, "page_size": 4, "kv_heads": model.kv_heads}
    pool = KVPool(**sizes, head_dim=model.head_dim, dtype=model.dtype, device=CPU, scratch=True)
    runner = Runner(model, pool, model.ops.attention(4, model.head_dim), DenseView(state.page_table))
    graphs = _Graphs()
    sampler = Sampler(state, VocabShard(0, 64, 64, Group.single()))
    DraftGraphs(runner, graphs, sampler, rows=[2], gammas=[3], first=2, width=WIDTH, layers=2)
    assert [batch.pages.shape for batch in graphs.batches] == [(2, 2, WIDTH)] * 3
    assert all(batch.per_layer for batch in graphs.batches)
    assert len({batch.pages.data_ptr() for batch in graphs.batches}) == 3


def test_drafts_read_windows_of_sliding_layers() -> None:
    """Each step has lists for both groups of layers, of the lengths of its own rows."""
    model = tiny_model(config=replace(TINY, sliding_window=6, sliding_layers=(1,)))
    state = RowState(max_rows=2, max_model_len=24, page_size=4, device=CPU, ops=model.ops, sliding_window=6)
    pool = pool_of(9, 4)
    runner = Runner(model, pool, model.ops.attention(4, model.head_dim), DenseView(state.page_table))
    graphs, sampler = _Graphs(), Sampler(state, VocabShard(0, 64, 64, Group.single()))
    room = SlidingRoom(pool_of(8, 4), 6, WIDTH)
    drafts = DraftGraphs(runner, graphs, sampler, rows=[2], gammas=[3], first=2, width=WIDTH, sliding=room)
    assert [(batch.window, batch.pages.shape[1]) for batch in graphs.batches] == [(0, WIDTH), (6, 3)] * 3
    assert len({batch.pages.data_ptr() for batch in graphs.batches}) == 6
    (bucket,) = drafts._buckets.values()
    bucket.later._lists.kv_lengths, bucket.later._sliding.kv_lengths = [5, 6, 7, 8], [1, 2, 3, 4]  # type: ignore[union-attr]
    bucket.plan(1, 3)
    planned = [(step.attention.lengths, step.sliding.attention.lengths) for step in bucket.steps[1:]]  # type: ignore
    assert planned == [([5, 6], [1, 2]), ([7, 8], [3, 4])]
