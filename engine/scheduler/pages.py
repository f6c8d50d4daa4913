"""Page allocation: counts the owners of each KV page. The pages' memory is in KVPool."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from itertools import chain, compress


class PageLeak(AssertionError):
    """Owned, cached and free pages do not add up to all pages: a fault of the engine, never of a request."""


class PageAllocator:
    """Reference-counted pages 0 … total - 1, each owned, cached or free. All or nothing: a reservation that does not
    fit is refused.

    `reserve` gives a page its first owner, `share` adds one. When its last owner has released it, a page is cached if
    it is `kept`, else free. A reservation takes free pages, then evicts cached ones: spent ones before others, and
    those first that were released first. Of the pages of one `release` call the last ones are released first.
    """

    def __init__(self, total: int, kept: AbstractSet[int], forget: Callable[[int], None]) -> None:
        """kept: the pages that are cached when nobody owns them any more, at any time. forget: called with a cached
        page that becomes free."""
        self.total = total
        self.evictions = 0
        self._kept, self._forget = kept, forget
        self._free = list(range(total - 1, -1, -1))  # a stack: pages just released are reused first, still in cache
        self._cached: OrderedDict[int, None] = OrderedDict()  # the next one to evict comes first
        self._spent: OrderedDict[int, None] = OrderedDict()  # likewise
        self._owners = [0] * total

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def cached(self) -> int:
        return len(self._cached) + len(self._spent)

    @property
    def available(self) -> int:
        """Number of pages that can be reserved."""
        return len(self._free) + self.cached

    @property
    def owned(self) -> int:
        return self.total - self.available

    def owners(self, page: int) -> int:
        return self._owners[page]

    def reserve(self, count: int) -> list[int] | None:
        """Reserve `count` pages with one owner each; None, and nothing changes, if fewer are available."""
        if count > self.available:
            return None
        while count > len(self._free):
            self.evictions += 1
            self.drop(next(iter(self._spent or self._cached)))
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._owners[page] = 1
        return pages

    def share(self, page: int) -> None:
        """Add one owner to a page. Raises PageLeak for a page that is free."""
        if self._owners[page] == 0:
            if page not in self._cached and page not in self._spent:
                raise PageLeak(f"page {page} is shared but nobody owns it")
            self._uncache(page)
        self._owners[page] += 1

    def release(self, pages: Sequence[int], *, spent: bool = False) -> None:
        """Drop one owner of each page. spent: whether they are of little use to others. Raises PageLeak for a page that
        nobody owns."""
        for page in reversed(pages):
            if self._owners[page] == 0:
                raise PageLeak(f"page {page} is released but nobody owns it")
            self._owners[page] -= 1
            if self._owners[page] == 0:
                if page in self._kept:
                    (self._spent if spent else self._cached)[page] = None
                else:
                    self._free.append(page)

    def drop_cached(self) -> None:
        """Free all cached pages."""
        while self.cached:
            self.drop(next(reversed(self._cached or self._spent)))

    def drop(self, page: int) -> None:
        """Free a cached page."""
        self._uncache(page)
        self._free.append(page)
        self._forget(page)

    def _uncache(self, page: int) -> None:
        del (self._spent if page in self._spent else self._cached)[page]

    def check(self, holdings: Iterable[Sequence[int]]) -> None:
        """Raise PageLeak unless `holdings`, the page lists of all owners, and the kept pages account for every page
        exactly."""
        held = Counter(chain.from_iterable(holdings))
        owned = {page: self._owners[page] for page in compress(range(self.total), self._owners)}
        if owned != dict(held):
            wrong = next(page for page in chain(range(self.total), held) if owned.get(page, 0) != held[page])
            raise PageLeak(f"page {wrong} counts {owned.get(wrong, 0)} owners but is held {held[wrong]} times")
        free, cached = set(self._free), {*self._spent, *self._cached}
        if len(free) != len(self._free) or len(free) + len(cached) + len(held) != self.total:
            raise PageLeak(f"{len(held)} pages owned, {len(cached)} cached and {len(self._free)} free of {self.total}")
        if not free.isdisjoint(held) or not free.isdisjoint(cached) or not cached.isdisjoint(held):
            raise PageLeak("a page is in two of the states owned, cached and free")
        if wrong_ones := (cached - self._kept) | (free & self._kept):
            page = min(wrong_ones)
            raise PageLeak(f"page {page} is {'cached' if page in cached else 'free'} against the index")

    @property
    def eviction_order(self) -> list[int]:
        """Cached pages, the next one to evict first."""
        return [*self._spent, *self._cached]
