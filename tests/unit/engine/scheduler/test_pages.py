"""The page accounts balance after any sequence of operations, and faults are detected."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.scheduler.pages import PageAllocator, PageLeak

OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["reserve", "share", "release"]), st.integers(0, 12), st.integers(0, 30)), max_size=60
)


@given(total=st.integers(0, 40), operations=OPERATIONS)
def test_pages_are_conserved(total: int, operations: list[tuple[str, int, int]]) -> None:
    allocator = PageAllocator(total)
    owners: list[list[int]] = []
    for operation, count, which in operations:
        if operation == "reserve":
            before = allocator.free
            pages = allocator.reserve(count)
            if pages is None:
                assert count > before == allocator.free  # refused only if it does not fit, and without side effects
            else:
                assert len(set(pages)) == count
                assert not {page for owned in owners for page in owned} & set(pages)
                owners.append(pages)
        elif owners:
            pages = owners[which % len(owners)]
            if operation == "share":
                allocator.share(pages)
                owners.append(list(pages))
            else:
                allocator.release(owners.pop(which % len(owners)))
        allocator.check(owners)
        assert allocator.free == total - len({page for owned in owners for page in owned})


def test_a_page_released_twice_is_a_fault() -> None:
    allocator = PageAllocator(3)
    pages = allocator.reserve(2)
    assert pages is not None
    allocator.release(pages)
    with pytest.raises(PageLeak, match="nobody owns"):
        allocator.release(pages[:1])


def test_sharing_a_free_page_is_a_fault() -> None:
    with pytest.raises(PageLeak, match="nobody owns"):
        PageAllocator(2).share([0])


def test_check_notices_a_forgotten_page() -> None:
    allocator = PageAllocator(3)
    pages = allocator.reserve(2)
    assert pages is not None
    with pytest.raises(PageLeak):
        allocator.check([pages[:1]])
    with pytest.raises(PageLeak):
        allocator.check([pages, pages])
    allocator.check([pages])
