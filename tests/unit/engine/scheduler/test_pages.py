"""The page accounts balance after any sequence of operations, and faults are detected."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.scheduler.pages import PageAllocator, PageLeak

OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["reserve", "share", "release", "keep", "drop"]), st.integers(0, 12), st.integers(0, 30)),
    max_size=60,
)


def allocator(total: int) -> tuple[PageAllocator, set[int]]:
    """Returns an allocator, and the pages that are kept."""
    kept: set[int] = set()
    return PageAllocator(total, kept, kept.discard), kept


@given(total=st.integers(0, 40), operations=OPERATIONS)
def test_pages_are_conserved(total: int, operations: list[tuple[str, int, int]]) -> None:
    made, kept = allocator(total)
    owners: list[list[int]] = []
    for operation, count, which in operations:
        owned = {page for pages in owners for page in pages}
        if operation == "reserve":
            before, order, free = made.available, made.eviction_order, made.free
            pages = made.reserve(count)
            if pages is None:
                assert count > before == made.available  # refused only if it does not fit, and without side effects
            else:
                assert len(set(pages)) == count
                assert not owned & set(pages)
                assert set(order[: max(0, count - free)]) <= set(pages), "the oldest cached pages go first"
                assert kept.isdisjoint(pages)
                owners.append(pages)
        elif operation == "drop":
            made.drop_cached()
            assert made.cached == 0
        elif operation == "share" and made.cached and which % 2:
            page = made.eviction_order[which % made.cached]
            made.share(page)
            owners.append([page])
        elif owners:
            pages = owners[which % len(owners)]
            if operation == "share":
                for page in pages:
                    made.share(page)
                owners.append(list(pages))
            elif operation == "keep":
                kept |= set(pages[: count // 2])
            else:
                made.release(owners.pop(which % len(owners)))
        made.check(owners)
        assert made.available == total - len({page for pages in owners for page in pages})
        assert set(made.eviction_order) == kept - {page for pages in owners for page in pages}


def test_of_the_pages_of_a_row_the_last_ones_are_evicted_first() -> None:
    made, kept = allocator(4)
    kept |= {0, 1, 2, 3}
    first, second = made.reserve(2), made.reserve(2)
    assert first is not None
    assert second is not None
    made.release(second)
    made.release(first)
    assert made.eviction_order == [*reversed(second), *reversed(first)]
    made.share(second[0])
    made.release(second[:1])
    assert made.eviction_order == [second[1], *reversed(first), second[0]]
    assert made.evictions == 0
    made.reserve(1)
    assert made.evictions == 1
    assert kept == {second[0], *first}


def test_a_page_released_twice_is_a_fault() -> None:
    made, _ = allocator(3)
    pages = made.reserve(2)
    assert pages is not None
    made.release(pages)
    with pytest.raises(PageLeak, match="nobody owns"):
        made.release(pages[:1])


def test_sharing_a_free_page_is_a_fault() -> None:
    with pytest.raises(PageLeak, match="nobody owns"):
        allocator(2)[0].share(0)


def test_check_notices_a_forgotten_page() -> None:
    made, kept = allocator(3)
    pages = made.reserve(2)
    assert pages is not None
    with pytest.raises(PageLeak, match=f"page {pages[1]} counts 1 owners but is held 0 times"):
        made.check([pages[:1]])
    with pytest.raises(PageLeak, match="counts 1 owners but is held 2 times"):
        made.check([pages, pages])
    for none in (-1, 3):
        with pytest.raises(PageLeak, match=f"page {none} counts 0 owners but is held 1 times"):
            made.check([[*pages, none]])
    made.check([pages])
    made.release(pages)
    kept.add(pages[0])
    with pytest.raises(PageLeak, match=f"page {pages[0]} is free against the index"):
        made.check([])


def test_check_notices_a_page_that_is_no_longer_kept() -> None:
    made, kept = allocator(3)
    pages = made.reserve(2)
    assert pages is not None
    kept |= set(pages)
    made.release(pages)
    made.check([])
    kept.remove(pages[1])
    with pytest.raises(PageLeak, match=f"page {pages[1]} is cached against the index"):
        made.check([])
