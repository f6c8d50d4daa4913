"""Page allocation: counts the owners of each KV page. The pages' memory is in KVPool."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence


class PageLeak(AssertionError):
    """Owned pages + free pages differ from total pages: a fault of the engine, never of a request."""


class PageAllocator:
    """Reference-counted pages 0 … total - 1. All or nothing: a reservation that does not fit is refused.

    `reserve` gives a page its first owner, `share` adds one. A page is free again when its last owner has released it.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(range(total - 1, -1, -1))  # a stack: pages just released are reused first, still in cache
        self._owners = [0] * total

    @property
    def free(self) -> int:
        return len(self._free)

    def reserve(self, count: int) -> list[int] | None:
        """Reserve `count` pages with one owner each; None, and nothing changes, if fewer are free."""
        if count > len(self._free):
            return None
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._owners[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Add one owner to each page. Raises PageLeak for a page that nobody owns."""
        for page in pages:
            if self._owners[page] == 0:
                raise PageLeak(f"page {page} is shared but nobody owns it")
            self._owners[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Drop one owner of each page. Raises PageLeak for a page that is free already."""
        for page in pages:
            if self._owners[page] == 0:
                raise PageLeak(f"page {page} is released but nobody owns it")
            self._owners[page] -= 1
            if self._owners[page] == 0:
                self._free.append(page)

    def check(self, holdings: Iterable[Sequence[int]]) -> None:
        """Raise PageLeak unless `holdings`, the page lists of all owners, account for every page exactly."""
        held = Counter(page for pages in holdings for page in pages)
        for page, owners in enumerate(self._owners):
            if owners != held[page]:
                raise PageLeak(f"page {page} counts {owners} owners but is held {held[page]} times")
        free = set(self._free)
        if len(free) != len(self._free) or len(free) + len(held) != self.total or not free.isdisjoint(held):
            raise PageLeak(f"{len(held)} pages owned and {len(self._free)} free of {self.total}")
