"""Sharded layers and models: the shard of each rank, and that N ranks compute the same as one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.weights.matrix import DenseMatrix
from models.config import ModelConfig, ModelError
from models.decoder import DecoderModel
from models.loader import random_model
from parallel.group import Group
from parallel.layers import ColumnLinear, Columns, LMHead, RowLinear, VocabEmbedding
from parallel.matrix_layer import Placement
from parallel.module import MatrixSlot, Module, WeightSlot
from parallel.split import split
from tests.support.rig import CPU, PagedRows, run_ranks

CONFIG = ModelConfig(
    vocab_size=53,
    hidden_size=40,
    intermediate_size=31,
    num_layers=2,
    num_heads=6,
    num_kv_heads=3,
    head_dim=8,
    max_position_embeddings=64,
)
VARIANTS = {
    "plain": CONFIG,
    "tied": dataclasses.replace(CONFIG, tie_word_embeddings=True),
    "biases": dataclasses.replace(CONFIG, qkv_bias=True, o_bias=True, mlp_bias=True),
    "qk_norm": dataclasses.replace(CONFIG, qk_norm="head"),
    "one KV head": dataclasses.replace(CONFIG, num_kv_heads=1),
}


def filled(layers: Iterable[Module], checkpoint: dict[str, Tensor]) -> None:
    for layer in layers:
        for slot in layer.weight_slots():
            assert checkpoint[slot.source].shape == slot.full_shape
            slot.tensor.copy_(checkpoint[slot.source][slot.index])
        for place in layer.matrix_slots():
            assert checkpoint[place.source].shape == place.full_shape
            place.fill(DenseMatrix(checkpoint[place.source][place.reads]))
        layer.prepare()


def place(group: Group) -> Placement:
    return Placement(group, torch.float64, CPU)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_column_then_row(size: int, bias: bool) -> None:
    """A fused pair of column layers of odd widths, and a row layer whose bias is added once."""
    checkpoint = {"a.weight": randn(7, 5), "a.bias": randn(7), "b.weight": randn(4, 5), "b.bias": randn(4)}
    checkpoint |= {"c.weight": randn(6, 7), "c.bias": randn(6)}
    x = randn(3, 5)

    def work(group: Group) -> tuple[Tensor, Tensor, Tensor]:
        mine, other = (split(total, group.size)[group.rank].slice() for total in (7, 4))
        column = ColumnLinear([Columns("a", 7, mine), Columns("b", 4, other)], 5, bias=bias, place=place(group))
        row = RowLinear("c", 7, 6, mine=mine, bias=bias, place=place(group))
        filled([column, row], checkpoint)
        a, b = column(x).split_with_sizes([mine.stop - mine.start, other.stop - other.start], dim=1)
        return a, b, row(a)

    ranks = run_ranks(size, work)
    a = F.linear(x, checkpoint["a.weight"], checkpoint["a.bias"] if bias else None)
    b = F.linear(x, checkpoint["b.weight"], checkpoint["b.bias"] if bias else None)
    c = F.linear(a, checkpoint["c.weight"], checkpoint["c.bias"] if bias else None)
    torch.testing.assert_close(torch.cat([rank[0] for rank in ranks], 1), a)
    torch.testing.assert_close(torch.cat([rank[1] for rank in ranks], 1), b)
    for rank in ranks:
        torch.testing.assert_close(rank[2], c)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("tied", [False, True])
def test_vocabulary(size: int, tied: bool) -> None:
    """An embedding replicated on every rank, and a sharded head; tied, both use one storage."""
    checkpoint = {"embed.weight": randn(11, 4), "head.weight": randn(11, 4)}
    ids = torch.tensor([0, 10, 5, 4, 3, 6, 7, 7])
    x = randn(2, 4)

    def work(group: Group) -> tuple[Tensor, Tensor, int]:
        embedding = VocabEmbedding("embed", 11, 4, place=place(group))
        head = LMHead("head", 11, 4, tied=embedding if tied else None, place=place(group))
        filled([embedding, head], checkpoint)
        assert head.shares_embedding == tied
        return embedding(ids), head(x), head.vocab.start

    ranks = run_ranks(size, work)
    weight = checkpoint["embed.weight" if tied else "head.weight"]
    torch.testing.assert_close(torch.cat([rank[1] for rank in ranks], 1), x @ weight.T)
    starts = [rank[2] for rank in ranks]
    assert starts == [part.start for part in split(11, size)]
    for rank in ranks:
        assert torch.equal(rank[0], checkpoint["embed.weight"][ids])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 6])
def test_slots_cover_the_checkpoint(variant: str, size: int) -> None:
    """Together the ranks hold every element, and more than once only replicated ones. The slots of a rank do not
    overlap."""
    config = VARIANTS[variant]
    held: dict[str, Tensor] = {}

    def work(group: Group) -> list[WeightSlot | MatrixSlot]:
        model = DecoderModel(config, place(group))
        return [*model.weight_slots(), *model.matrix_slots()]

    for slots in run_ranks(size, work):
        assert len({slot.source for slot in slots}) == len(slots)
        for slot in slots:
            count = held.setdefault(slot.source, torch.zeros(slot.full_shape, dtype=torch.int64))
            count[slot.index] += 1
        storage = [slot for slot in slots if isinstance(slot, WeightSlot)]
        assert all(slot.tensor.shape == held[slot.source][slot.index].shape for slot in storage)
        ranges = sorted((slot.tensor.data_ptr(), slot.tensor.nbytes) for slot in storage)
        assert all(start + size <= after for (start, size), (after, _) in pairwise(ranges))
    for source, count in held.items():
        assert count.min() >= 1
        whole = "norm" in source or source.endswith(("o_proj.bias", "down_proj.bias"))
        shared_kv = "k_proj" in source or "v_proj" in source
        if whole:
            assert (count == size).all()
        elif not (shared_kv and size > config.num_kv_heads):
            assert (count == 1).all()
    assert ("lm_head.weight" in held) != config.tie_word_embeddings


@pytest.mark.parametrize("variant", VARIANTS)
def test_ranks_agree_with_one(variant: str) -> None:
    """Logits of a chunked prompt and of decoding, for every number of ranks up to one query head each."""
    config = VARIANTS[variant]
    text = torch.randint(config.vocab_size, (19,), generator=torch.Generator().manual_seed(1)).tolist()

    def work(group: Group) -> tuple[int, int, Tensor]:
        model = random_model(config, 5, torch.float64, CPU, group)
        assert model.vocab_size == split(config.vocab_size, group.size)[group.rank].size
        rows = PagedRows(model, [len(text)], page_size=4)
        parts = [rows.forward({0: part}, {0: range(len(part))}) for part in (text[:9], text[9:17], [text[17]])]
        return model.vocab_start, model.kv_heads, torch.cat([*parts, rows.forward({0: text[18:]}, {0: [0]})])

    (_, _, expected), *_ = run_ranks(1, work)
    assert expected.shape == (19, config.vocab_size)
    for size in range(2, config.num_heads + 1):
        ranks = run_ranks(size, work)
        assert [start for start, _, _ in ranks] == [part.start for part in split(config.vocab_size, size)]
        assert sum(kv_heads for _, kv_heads, _ in ranks) == max(size, config.num_kv_heads)
        logits = torch.cat([part for _, _, part in ranks], 1)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)


def test_more_ranks_than_heads() -> None:
    def work(group: Group) -> None:
        with pytest.raises(ModelError, match="tensor parallel size 7: 6 query heads cannot be split over 7 ranks"):
            DecoderModel(CONFIG, place(group))

    run_ranks(7, work)
