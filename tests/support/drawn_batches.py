"""Random batches whose rows share pages, for tests that have Hypothesis."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import strategies as st

from kernels.attention.base import AttentionBatch, SharedPrefix


@st.composite
def shared_batches(
    draw: st.DrawFn,
    *,
    page_size: int,
    pages: int,
    queries: Sequence[int],
    heads: int = 0,
    max_rows: int = 5,
    max_shared: int = 9,
) -> AttentionBatch:
    """Rows in random prefixes, or in none. pages: of the pool. queries: numbers of queries that a row may have. heads:
    number of page lists per row; 0: one for all heads. max_shared: most pages of a prefix."""
    rows = draw(st.integers(2, max_rows))
    counts = [draw(st.sampled_from(queries)) for _ in range(rows)]
    shared = [draw(st.integers(1, max_shared)) for _ in range(2)]
    owner = [draw(st.integers(0, 2)) for _ in range(rows)]  # 2: no prefix
    prefixes = [
        SharedPrefix(tuple(members), shared[each])
        for each in range(2)
        if len(members := [row for row in range(rows) if owner[row] == each]) > 1
    ]
    before = [0] * rows
    for prefix in prefixes:
        for row in prefix.rows:
            before[row] = prefix.pages * page_size
    lengths = [n + first + draw(st.sampled_from([0, 1, 70])) for n, first in zip(counts, before, strict=True)]
    width = -(-max(lengths) // page_size) + 1
    lists = torch.randint(
        pages,
        (rows, heads, width) if heads else (rows, width),
        generator=torch.Generator().manual_seed(draw(st.integers(0, 1000))),
    )
    for prefix in prefixes:
        lists[list(prefix.rows), ..., : prefix.pages] = lists[prefix.rows[0], ..., : prefix.pages].clone()
    return AttentionBatch(counts, lengths, lists, prefixes=prefixes)
