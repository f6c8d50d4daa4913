"""Pages that the views of windows list."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.batch.view import DenseView
from engine.kv.window import WindowView


@given(
    page_size=st.integers(1, 9),
    sink=st.integers(1, 20),
    extra=st.integers(1, 8),
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=5),
)
def test_window_reads_the_first_and_the_last_pages(page_size: int, sink: int, extra: int, lengths: list[int]) -> None:
    sink_pages = -(-sink // page_size)
    budget = (sink_pages + extra) * page_size
    table = torch.arange(len(lengths) * 300).view(len(lengths), 300) + 7
    window = WindowView(table, budget=budget, sink=sink, page_size=page_size)
    rows, contexts = np.arange(len(lengths)), np.array(lengths)
    skipped, leading = window.skipped(rows, contexts), window.leading(rows, contexts)
    width = -(-int((contexts - skipped).max()) // page_size)
    listed = window.pages(torch.from_numpy(rows), torch.from_numpy(contexts), width)
    for row, length in enumerate(lengths):
        read = length - skipped[row]
        assert read <= budget
        pages = -(-length // page_size)
        slots = [
            (int(page) - 7 - row * 300) * page_size + offset for page in listed[row] for offset in range(page_size)
        ][:read]
        if length <= budget:
            assert slots == list(range(length))  # below the budget, the view is dense
            assert leading[row] == length
        else:
            first = (pages - extra) * page_size
            assert slots == [*range(sink_pages * page_size), *range(first, length)]
            assert read > budget - page_size
            assert leading[row] == sink_pages * page_size


@pytest.mark.parametrize(("budget", "sink"), [(30, 4), (16, 16), (16, 17)])
def test_window_refuses_budgets_it_cannot_keep(budget: int, sink: int) -> None:
    with pytest.raises(ValueError, match="budget"):
        WindowView(torch.zeros(1, 1), budget=budget, sink=sink, page_size=16)


def test_dense_reads_everything() -> None:
    dense = DenseView(torch.arange(40).view(2, 20))
    rows, contexts = np.array([1]), np.array([17])
    assert dense.skipped(rows, contexts).tolist() == [0]
    assert dense.leading(rows, contexts).tolist() == [17]
    assert dense.pages(torch.tensor([1]), torch.tensor([17]), 5).tolist() == [[20, 21, 22, 23, 24]]
