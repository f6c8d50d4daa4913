"""Pages that a view lists."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.kv.policies import Dense, Window


@given(
    page_size=st.integers(1, 9),
    sink=st.integers(1, 20),
    extra=st.integers(1, 8),
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=5),
)
def test_window_reads_the_first_and_the_last_pages(page_size: int, sink: int, extra: int, lengths: list[int]) -> None:
    sink_pages = -(-sink // page_size)
    budget = (sink_pages + extra) * page_size
    window = Window(budget=budget, sink=sink, page_size=page_size)
    table = torch.arange(len(lengths) * 300).view(len(lengths), 300) + 7
    rows = torch.arange(len(lengths))
    width = -(-max(length - window.skipped(length) for length in lengths) // page_size)
    listed = window.pages(table, rows, torch.tensor(lengths), width)
    for row, length in enumerate(lengths):
        read = length - window.skipped(length)
        assert read <= budget
        pages = -(-length // page_size)
        slots = [
            (int(page) - 7 - row * 300) * page_size + offset for page in listed[row] for offset in range(page_size)
        ][:read]
        if length <= budget:
            assert slots == list(range(length))  # below the budget, the view is dense
            assert window.leading(length) == length
        else:
            first = (pages - extra) * page_size
            assert slots == [*range(sink_pages * page_size), *range(first, length)]
            assert read > budget - page_size
            assert window.leading(length) == sink_pages * page_size


@pytest.mark.parametrize(("budget", "sink"), [(30, 4), (16, 16), (16, 17)])
def test_window_refuses_budgets_it_cannot_keep(budget: int, sink: int) -> None:
    with pytest.raises(ValueError, match="budget"):
        Window(budget=budget, sink=sink, page_size=16)


def test_dense_reads_everything() -> None:
    table = torch.arange(40).view(2, 20)
    dense = Dense()
    assert dense.skipped(17) == 0
    assert dense.leading(17) == 17
    assert dense.pages(table, torch.tensor([1]), torch.tensor([17]), 5).tolist() == [[20, 21, 22, 23, 24]]
