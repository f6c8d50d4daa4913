"""Choosing over a vocabulary in slices equals choosing over the whole vocabulary, bit for bit, ties included."""

from __future__ import annotations

from typing import NamedTuple

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from parallel.group import Group
from parallel.split import split
from parallel.vocab_shard import VocabShard
from tests.support.profiles import examples
from tests.support.rig import run_ranks


class Choices(NamedTuple):
    argmax: Tensor
    cut: Tensor
    whole: Tensor
    chosen: Tensor
    top: Tensor
    top_ids: Tensor


def choose(
    group: Group, logits: Tensor, truncation: tuple[Tensor, Tensor, Tensor], candidates: int, tokens: Tensor, most: int
) -> Choices:
    """Choose from this rank's slice of `logits`, [rows, vocabulary]."""
    total = logits.shape[1]
    mine = split(total, group.size)[group.rank]
    vocab = VocabShard(mine.start, mine.size, total, group)
    shard = logits[:, mine.slice()].contiguous()
    return Choices(
        vocab.argmax(shard),
        vocab.cut(shard, *truncation, candidates=candidates),
        vocab.whole(shard),
        *vocab.logprobs(shard, tokens, most),
    )


@given(data=st.data(), size=st.sampled_from([2, 3, 5]), dtype=st.sampled_from([torch.float32, torch.float64]))
@examples(15, 120)
def test_slices_choose_as_one(data: st.DataObject, size: int, dtype: torch.dtype) -> None:
    """Few distinct logits, so that ties occur at every cut, and across ranks."""
    total = data.draw(st.integers(size, 24))
    rows = data.draw(st.integers(1, 4))
    value = st.sampled_from([-float("inf"), -3.0, -1.0, -1.0, 0.0, 0.3, 0.3, 2.0])
    table = data.draw(st.lists(st.lists(value, min_size=total, max_size=total), min_size=rows, max_size=rows))
    logits = torch.tensor(table, dtype=dtype)
    logits[:, data.draw(st.integers(0, total - 1))] = 1.7  # at least one token is possible
    flat = data.draw(st.booleans())  # a row with a top-p and no top-k takes all logits
    top_k = torch.tensor(data.draw(st.lists(st.integers(0 if flat else 1, 9), min_size=rows, max_size=rows)))
    top_p = torch.tensor(data.draw(st.lists(st.sampled_from([1.0, 0.9, 0.5, 1e-6, 0.0]), min_size=rows, max_size=rows)))
    min_p = torch.tensor(data.draw(st.lists(st.sampled_from([0.0, 0.2, 1.0]), min_size=rows, max_size=rows)))
    truncation = top_k, top_p.double(), min_p.double()
    candidates = total if flat else int(top_k.max())
    tokens = torch.tensor(data.draw(st.lists(st.integers(0, total - 1), min_size=rows, max_size=rows)))
    most = data.draw(st.integers(0, total))

    expected = choose(Group.single(), logits, truncation, candidates, tokens, most)
    for got in run_ranks(size, lambda group: choose(group, logits, truncation, candidates, tokens, most)):
        assert torch.equal(got.argmax, expected.argmax)
        assert torch.equal(got.cut, expected.cut)
        assert torch.equal(got.whole, logits)
        assert torch.equal(got.top_ids, expected.top_ids)
        torch.testing.assert_close(got.chosen, expected.chosen)
        torch.testing.assert_close(got.top, expected.top)

    # The single rank is right too: the lowest id comes first among ties, whatever topk does.
    order = sorted(range(total), key=lambda token: (-logits[0, token].item(), token))
    assert expected.top_ids[0].tolist() == order[:most]
    assert expected.argmax[0].item() == order[0]
    torch.testing.assert_close(expected.chosen, logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0])


def test_one_candidate_decides_a_top_p_of_zero() -> None:
    """A top-p of zero keeps the largest logit and its ties, on whatever rank they are."""
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0, -1.0, 0.5]])
    truncation = torch.zeros(1, dtype=torch.int64), torch.zeros(1).double(), torch.zeros(1).double()
    tokens = torch.zeros(1, dtype=torch.int64)
    for got in run_ranks(3, lambda group: choose(group, logits, truncation, 1, tokens, 0)):
        assert got.cut.item() == 2.0


@given(seed=st.integers(0, 1000), size=st.sampled_from([2, 4]))
@examples(6, 40)
def test_few_candidates_decide_as_all_do(seed: int, size: int) -> None:
    """With a top-k, the exchanged data grows with k and not with the vocabulary; the cut equals that over whole
    rows."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(6, 400, generator=generator, dtype=torch.float64) * 3).round(decimals=1)  # with ties
    top_k = torch.randint(1, 40, (6,), generator=generator)
    truncation = top_k, torch.rand(6, generator=generator, dtype=torch.float64), torch.zeros(6).double()
    tokens = torch.zeros(6, dtype=torch.int64)
    of_all = choose(Group.single(), logits, truncation, 400, tokens, 0).cut
    for got in run_ranks(size, lambda group: choose(group, logits, truncation, 40, tokens, 0)):
        assert torch.equal(got.cut, of_all)
