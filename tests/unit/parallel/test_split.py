from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.split import HeadSplit, Range, split, split_heads


@given(total=st.integers(1, 500), data=st.data())
def test_split_is_an_even_partition(total: int, data: st.DataObject) -> None:
    parts = data.draw(st.integers(1, total))
    ranges = split(total, parts)
    assert [i for part in ranges for i in range(part.start, part.stop)] == list(range(total))
    sizes = [part.size for part in ranges]
    assert len(sizes) == parts
    assert sizes == sorted(sizes, reverse=True)
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("total", "parts"), [(3, 0), (3, -1), (3, 4), (0, 1)])
def test_split_refuses_empty_parts(total: int, parts: int) -> None:
    with pytest.raises(ValueError, match=f"cannot split {total} into {parts}"):
        split(total, parts)


def test_range_in_elements() -> None:
    assert Range(2, 5).size == 3
    assert Range(2, 5).slice() == slice(2, 5)
    assert Range(2, 5).slice(64) == slice(128, 320)


@given(kv_heads=st.integers(1, 12), group=st.integers(1, 8), data=st.data())
def test_heads(kv_heads: int, group: int, data: st.DataObject) -> None:
    heads = kv_heads * group
    ranks = data.draw(st.integers(1, heads))
    shares = split_heads(heads, kv_heads, ranks)
    assert len(shares) == ranks
    assert [h for mine in shares for h in range(mine.heads.start, mine.heads.stop)] == list(range(heads))
    for mine in shares:
        local, local_kv = mine.heads.size, mine.kv_heads.size
        assert local >= 1
        assert local % local_kv == 0
        for i in range(local):  # the head that attention reads locally is the model's
            assert mine.kv_heads.start + i // (local // local_kv) == (mine.heads.start + i) // group
    held = [kv for mine in shares for kv in range(mine.kv_heads.start, mine.kv_heads.stop)]
    assert set(held) == set(range(kv_heads))
    copies = [held.count(kv) for kv in range(kv_heads)]
    assert max(copies) - min(copies) <= 1  # ranks are spread evenly over KV heads
    assert ranks > kv_heads or max(copies) == 1  # a KV head is replicated only if there are fewer KV heads than ranks


def test_known_splits() -> None:
    assert split_heads(9, 3, 1) == [HeadSplit(Range(0, 9), Range(0, 3))]
    assert split_heads(9, 3, 2) == [HeadSplit(Range(0, 6), Range(0, 2)), HeadSplit(Range(6, 9), Range(2, 3))]
    assert [mine.kv_heads.start for mine in split_heads(9, 3, 8)] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert [mine.heads.size for mine in split_heads(9, 3, 8)] == [1, 1, 1, 1, 1, 1, 2, 1]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "ranks", "message"),
    [
        (9, 3, 10, "9 query heads cannot be split over 10 ranks"),
        (9, 3, 0, "9 query heads cannot be split over 0 ranks"),
        (9, 2, 1, "9 query heads cannot share 2 KV heads"),
        (4, 0, 1, "4 query heads cannot share 0 KV heads"),
    ],
)
def test_impossible_heads(heads: int, kv_heads: int, ranks: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_heads(heads, kv_heads, ranks)
