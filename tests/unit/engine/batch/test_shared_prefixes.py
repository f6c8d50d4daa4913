"""Prefixes that rows share: the best partition, after any changes of page lists, and little work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.batch.row_state import RowState
from engine.batch.shared_prefixes import PageLists
from engine.batch.view import DenseView, View
from engine.kv.window import WindowView
from engine.params import SamplingParams
from engine.plan import PageDelta, RoundPlan, RowStart, RowWork
from kernels.attention.base import SharedPrefix
from kernels.ragged import Ints
from kernels.reference_ops import ReferenceOps
from tests.support.profiles import examples


def ints(values: Sequence[int]) -> Ints:
    return np.array(values, dtype=np.int64)


def saved(prefixes: Sequence[SharedPrefix]) -> int:
    return sum((len(each.rows) - 1) * each.pages for each in prefixes)


def partitions(rows: list[int]) -> Iterator[list[list[int]]]:
    if not rows:
        yield []
        return
    for rest in partitions(rows[1:]):
        yield [[rows[0]], *rest]
        for index, part in enumerate(rest):
            yield [*rest[:index], [rows[0], *part], *rest[index + 1 :]]


def alike(lists: Sequence[Sequence[int]]) -> int:
    """Number of first pages that all lists have in common."""
    count = 0
    while all(len(each) > count for each in lists) and len({each[count] for each in lists}) == 1:
        count += 1
    return count


@given(data=st.data())
@examples(60, 400)
def test_prefixes_save_the_most_pages(data: st.DataObject) -> None:
    """Lists of few different pages, so that they form trees; changed in the middle, appended to, and started anew."""
    lists = PageLists(6, 9)
    expected: list[list[int]] = [[] for _ in range(6)]
    for _ in range(data.draw(st.integers(1, 6))):
        for row in range(6):
            if data.draw(st.booleans()):
                if data.draw(st.booleans()):
                    lists.clear(row)
                    expected[row] = []
                first = data.draw(st.integers(0, len(expected[row])))
                pages = data.draw(st.lists(st.integers(1, 2), max_size=9 - first))
                lists.write(row, first, pages)
                expected[row][first : first + len(pages)] = pages
        same = data.draw(st.booleans())  # as asked before
        rows = list(range(6)) if same else data.draw(st.permutations(range(6)))[: data.draw(st.integers(1, 6))]
        limits = [10 if same else data.draw(st.integers(0, 10)) for _ in rows]
        found = lists.prefixes(ints(rows), ints(limits))
        seen = [expected[row][:limit] for row, limit in zip(rows, limits, strict=True)]
        named = [index for each in found for index in each.rows]
        assert len(named) == len(set(named))
        for each in found:
            assert len(each.rows) > 1
            assert 0 < each.pages <= alike([seen[index] for index in each.rows])
        best = max(
            sum((len(part) - 1) * alike([seen[index] for index in part]) for part in parts)
            for parts in partitions(list(range(len(rows))))
        )
        assert saved(found) == best


def test_a_tree() -> None:
    """All share two pages, three rows four more. Eight rows gain more from the system prompt than three from the
    document; longer documents turn the choice, and the others keep the system prompt."""
    lists = PageLists(8, 80)
    for row in range(8):
        lists.write(row, 0, [1, 2, 100 + row])
    rows, limits = np.arange(8), np.full(8, 80)
    assert lists.prefixes(rows, limits) == [SharedPrefix(tuple(range(8)), 2)]
    for row in (2, 4, 7):
        lists.write(row, 2, range(10, 14))
    assert lists.prefixes(rows, limits) == [SharedPrefix((0, 1, 3, 5, 6), 2), SharedPrefix((2, 4, 7), 6)]
    assert lists.prefixes(rows[:5], limits[:5]) == [SharedPrefix((0, 1, 3), 2), SharedPrefix((2, 4), 6)]
    assert lists.prefixes(ints([5, 6]), ints([1, 9])) == [SharedPrefix((0, 1), 1)]
    assert lists.prefixes(ints([5]), ints([9])) == []
    assert lists.prefixes(ints([5, 5]), ints([9, 9])) == []


def test_a_chain_of_many_lengths_takes_little_work() -> None:
    lists = PageLists(200, 400)
    for row in range(200):
        lists.write(row, 0, [*range(row + 1), 1000 + row])
    found = lists.prefixes(np.arange(200), np.full(200, 400))
    assert saved(found) > 199


def test_rows_are_compared_again_only_where_they_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    lists = PageLists(4, 50)
    compared: list[tuple[int, int]] = []
    shared = PageLists._shared

    def note(self: PageLists, row: int, other: int) -> int:
        if other not in self._common[row]:
            compared.append((row, other))
        return shared(self, row, other)

    monkeypatch.setattr(PageLists, "_shared", note)
    for row in range(4):
        lists.write(row, 0, [1, 2, 3, 10 + row])
    everything = np.arange(4), np.full(4, 50)
    assert lists.prefixes(*everything) == [SharedPrefix((0, 1, 2, 3), 3)]
    assert len(compared) == 3
    for row in range(4):
        lists.write(row, 4, [20 + row])  # behind the place where rows differ
    assert lists.prefixes(*everything) == [SharedPrefix((0, 1, 2, 3), 3)]
    assert lists.prefixes(np.arange(3), np.full(3, 50)) == [SharedPrefix((0, 1, 2), 3)]
    assert len(compared) == 3
    lists.write(1, 3, [10])  # row 1 takes over a page of row 0
    assert lists.prefixes(*everything) == [SharedPrefix((0, 1, 2, 3), 3)]
    assert compared[3:] == [(0, 1)]
    lists.clear(2)
    lists.write(2, 0, [7])
    assert lists.prefixes(*everything) == [SharedPrefix((0, 1, 3), 3)]


class Sharing(ReferenceOps):
    reads_prefixes = True


def state_of(ops: ReferenceOps) -> RowState:
    """Three rows with six pages of which four are the same, and 20 computed tokens in pages of four; one without."""
    state = RowState(max_rows=4, max_model_len=64, page_size=4, device=torch.device("cpu"), ops=ops)
    starts = [RowStart(row, [2] * 21, 21, SamplingParams(), [], 20) for row in range(4)]
    pages = [PageDelta(row, 0, [1, 2, 3, 4, 10 + row, 20 + row]) for row in range(3)]
    state.apply(RoundPlan(0, starts, [*pages, PageDelta(3, 0, [30, 31, 32, 33, 34, 35])], []))
    return state


def prefixes(state: RowState, view: View, ahead: Sequence[int] = (0, 0, 0, 0)) -> Sequence[SharedPrefix]:
    rows, ones = np.arange(4), np.ones(4, dtype=np.int64)
    inputs = state.forward_inputs(rows, ints([20] * 4), ints(ahead), ones, view, ints([]))
    for prefix in inputs.attention.prefixes:
        lists = inputs.attention.pages[list(prefix.rows), : prefix.pages]
        assert (lists == lists[0]).all()
    return inputs.attention.prefixes


def test_forwards_name_the_prefixes_that_all_queries_see() -> None:
    state = state_of(Sharing())
    dense = DenseView(state.page_table)
    assert prefixes(state, dense) == [SharedPrefix((0, 1, 2), 4)]
    # A draft model that still computes the prompt: row 2's query writes to a page that the others share.
    assert prefixes(state, dense, (0, 0, -9, 0)) == [SharedPrefix((0, 1), 4)]
    assert prefixes(state, dense, (0, -9, -9, 0)) == [SharedPrefix((0, 1, 2), 2)]
    assert prefixes(state, dense, (0, -20, -20, 0)) == []
    other_pool = DenseView(state.page_table.clone(), shares=False)
    assert prefixes(state, other_pool) == []
    assert prefixes(state_of(ReferenceOps()), DenseView(state.page_table)) == []


def test_windows_share_their_sink() -> None:
    state = state_of(Sharing())
    window = WindowView(state.page_table, budget=12, sink=5, page_size=4)
    assert prefixes(state, window) == [SharedPrefix((0, 1, 2), 2)]
    # A window that leaves nothing out lists what dense attention does.
    wide = WindowView(state.page_table, budget=24, sink=5, page_size=4)
    assert prefixes(state, wide) == [SharedPrefix((0, 1, 2), 4)]
    # Rows that leave tokens out beside rows that do not: see the policy.
    assert prefixes(state, window, (0, -9, -9, 0)) == [SharedPrefix((0, 1, 2), 2)]


def test_rows_of_an_abandoned_round_share_nothing() -> None:
    state = state_of(Sharing())
    state.reset_rows(RoundPlan(1, [], [], [RowWork(row, 20, 1, 0, True) for row in range(3)]))
    assert prefixes(state, DenseView(state.page_table)) == []
