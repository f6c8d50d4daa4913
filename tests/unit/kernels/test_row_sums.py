"""Sums of rows: right, and the same to the bit for any number of rows and threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.row_sums import row_logsumexp, row_sum
from parallel.group import Group
from parallel.vocab_shard import VocabShard
from tests.support.profiles import is_all

VOCAB = 49152
ROWS = 40 if is_all() else 12


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@given(rows=st.integers(0, 4), size=st.integers(1, 70), seed=st.integers(0, 99), low=st.booleans())
def test_values(rows: int, size: int, seed: int, low: bool) -> None:
    x = torch.randn(rows, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 9
    if low and rows:
        x[0] = float("-inf")
        x[-1, size // 2] = float("-inf")
    torch.testing.assert_close(row_logsumexp(x), x.logsumexp(-1, keepdim=True))
    x = x.masked_fill(x.isinf(), 1.0)
    torch.testing.assert_close(row_sum(x), x.sum(-1, keepdim=True))


@pytest.mark.parametrize("threads_used", [1, 2])
def test_other_rows_candidates_change_no_cut(threads_used: int) -> None:
    """With a top-k, a row's nucleus adds up as many candidates as the largest top-k of its batch."""
    vocab = VocabShard(0, VOCAB, VOCAB, Group.single())
    logits = torch.randn(40, VOCAB, generator=torch.Generator().manual_seed(5)).mul_(4)
    top_k = torch.arange(2, 42)
    with threads(threads_used):
        ordered = logits.double().sort(-1, descending=True).values
        for row in range(40):
            # A nucleus whose mass is, but for rounding, that of some of the candidates.
            above = (ordered[row, : top_k[row]] - ordered[row, 0]).exp()
            top_p = (above.cumsum(0) / above.sum())[row // 2 : row // 2 + 1]
            mine, options = logits[row : row + 1], (top_k[row : row + 1], top_p, torch.zeros(1, dtype=torch.float64))
            cuts = [vocab.cut(mine, *options, candidates=count) for count in (int(top_k[row]), 61, 100, 1000)]
            assert len({float(cut) for cut in cuts}) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_decides_its_bits_alone(dtype: torch.dtype) -> None:
    """What sampling adds up over a vocabulary."""
    vocab = VocabShard(0, VOCAB, VOCAB, Group.single())
    logits = torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(3)).mul_(4).to(dtype)
    tokens = torch.arange(ROWS)
    off = torch.zeros(ROWS, dtype=torch.int64), torch.linspace(0.1, 0.99, ROWS, dtype=torch.float64), torch.zeros(ROWS)

    def results(index: slice) -> list[torch.Tensor]:
        mine = logits[index].clone()
        return [
            row_sum(mine),
            row_logsumexp(mine),
            vocab.normalised(mine),
            vocab.cut(mine, off[0][index], off[1][index], off[2][index].double(), VOCAB),
            *vocab.logprobs(mine, tokens[index], 5),
        ]

    with threads(1):
        alone = [results(slice(i, i + 1)) for i in range(ROWS)]
    for count in (1, 2):
        with threads(count):
            for size in (1, 4, ROWS):
                for first in range(0, ROWS, size):
                    for found, *parts in zip(
                        results(slice(first, first + size)), *alone[first : first + size], strict=True
                    ):
                        assert torch.equal(found, torch.cat(parts))
