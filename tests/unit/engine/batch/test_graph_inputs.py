"""Inputs of captured forwards, with lists for all layers and KV heads or for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.batch.forward_graphs import GraphInputs
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
from tests.support.engines import tiny_model
from tests.support.rig import CPU

WIDTH = 6


def lists_of(rows: int, width: int, layers: int, heads: int) -> Tensor:
    return torch.randint(9, [*[layers] * (layers > 0), rows, *[heads] * (heads > 0), width])


@pytest.mark.parametrize("layers", [0, 3])
@pytest.mark.parametrize("heads", [0, 2])
def test_lists_reach_their_rows(layers: int, heads: int) -> None:
    """Of a smaller batch too, in any order; a part has its rows' lists, of every layer and KV head, at fixed
    addresses."""
    sizes = {"num_layers": 3, "num_pages": 9, "page_size": 4, "kv_heads": 2, "head_dim": 4}
    pool = KVPool(**sizes, dtype=torch.float32, device=CPU, scratch=True)
    inputs = GraphInputs(pool, rows=4, queries=2, width=WIDTH, layers=layers, heads=heads)
    parts = [inputs.part(first, 2)[1] for first in (0, 2)]
    for rows, width in (([2, 0, 3], 4), ([1], WIDTH)):
        pages, tokens = lists_of(len(rows), width, layers, heads), torch.arange(len(rows))
        batch = AttentionBatch([1] * len(rows), [9] * len(rows), pages, per_layer=layers > 0)
        inputs.copy(ForwardBatch(tokens, tokens, tokens, attention=batch, logit_index=tokens), np.array(rows))
        for index, row in enumerate(rows):
            part = parts[row // 2]
            assert part.per_layer == batch.per_layer
            assert part.per_head == batch.per_head == (heads > 0)
            for layer in map(pool.layer, range(3)):
                found = part.pages_of(layer)[row % 2, ..., :width]
                assert torch.equal(found, batch.pages_of(layer)[index])
            assert part.lengths[row % 2] == 9


def test_lists_per_layer_have_no_prefixes() -> None:
    pages, prefix = lists_of(2, 3, 2, 0), SharedPrefix((0, 1), 1)
    with pytest.raises(AssertionError):
        AttentionBatch([1, 1], [9, 9], pages, per_layer=True, prefixes=[prefix])
    with pytest.raises(AssertionError):
        GraphBatch(1, pages, torch.ones(2, dtype=torch.int64), prefixes=1, per_layer=True)


class _Attention:
    def plan(self, kv_lengths: Sequence[int], prefixes: Sequence[SharedPrefix] = ()) -> None:
        """Nothing to plan."""

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
    DraftGraphs(runner, graphs, sampler, rows=[2], gammas=[3], first=2, width=WIDTH, layers=2, heads=1)
    assert [batch.pages.shape for batch in graphs.batches] == [(2, 2, 1, WIDTH)] * 3
    assert all(batch.per_layer and batch.per_head for batch in graphs.batches)
    assert len({batch.pages.data_ptr() for batch in graphs.batches}) == 3
