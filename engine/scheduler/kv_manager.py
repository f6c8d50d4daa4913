"""KV manager: which request owns which pages, and which pages hold KV that another request can take over."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterable, Sequence

from engine.scheduler.pages import PageAllocator, PageLeak
from engine.scheduler.prefix_index import IndexedPage, PrefixIndex
from engine.scheduler.request import Request


class KVManager:
    """Owner of all pages of the pool, target's and draft model's alike. A page is owned, cached or free.

    With a prefix index, a page enters it once a round has computed all of its tokens, whether prompt or output; drafts
    never do. If the index has that content already, the request adopts the indexed page and gives its own back. So

        the first `num_indexed` pages of a request are those that the index names for its tokens,

    rows that begin with the same tokens list the same pages, and whoever owns a page owns its parents. When a request
    is admitted, it takes over the pages that it finds (`match`, `admit`). Pages of requests that end or are preempted
    stay cached until they are evicted, least recently used first, children before parents.

    queries, hits: prompt tokens looked up at first admissions, and those found. replaced: for an audit, which sets
    and empties it: pages that requests have given back for indexed ones; they hold the same KV until the next round.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        *,
        prefix: bool = True,
        num_uncached_tokens: int = 1,
        draft_pages: bool = False,
        shared_stretch: int = 0,
    ) -> None:
        """prefix: whether there is a prefix index. num_uncached_tokens: number of tokens at the end of a request that
        it always computes itself. draft_pages: whether the pages also hold a draft model's KV, which requests compute
        later than the target's, or not at all. shared_stretch: see kernels.ops.Ops.
        """
        self._page_size = page_size
        self._index = PrefixIndex(page_size)
        self._pages = PageAllocator(num_pages, self._index.__contains__, self._forget)
        self._prefix = prefix
        self._num_uncached_tokens = num_uncached_tokens
        self._drafted: set[int] | None = set() if draft_pages else None  # indexed pages whose draft KV is computed
        self._stretch = max(1, shared_stretch // page_size) if shared_stretch else 0  # in pages
        self._num_shared_stretches = 0
        self.replaced: list[IndexedPage] | None = None
        self.queries = self.hits = 0

    # -- sizes -------------------------------------------------------------------------------------------------------

    @property
    def total(self) -> int:
        return self._pages.total

    @property
    def free(self) -> int:
        return self._pages.free

    @property
    def cached(self) -> int:
        return self._pages.cached

    @property
    def available(self) -> int:
        """Number of pages that requests can get: free and cached ones."""
        return self._pages.available

    @property
    def evictions(self) -> int:
        return self._pages.evictions

    @property
    def shared_tokens(self) -> int:
        """KV tokens of all requests that attention need not read, because it reads the same pages for another one."""
        return self._num_shared_stretches * self._stretch * self._page_size

    # -- requests ----------------------------------------------------------------------------------------------------

    def match(self, request: Request) -> list[int]:
        """Find the pages that a waiting request can take over: those of its first tokens."""
        if not self._looks_up(request):
            return []
        if request.matched_at != self._pages.evictions:  # some of the pages found last may be gone
            request.matched.clear()
            request.matched_at = self._pages.evictions
        limit = max(0, request.num_tokens - self._num_uncached_tokens) // self._page_size
        self._index.extend(request.digests, request.salt, request.tokens, limit)
        while len(request.matched) < limit:
            page = self._index.find(request.digests[len(request.matched)])
            if page is None:
                break
            request.matched.append(page)
        return request.matched

    def _looks_up(self, request: Request) -> bool:
        """Whether a request takes over pages. Log-probabilities of a prompt need all of its tokens to be computed."""
        return self._prefix and request.params.prompt_logprobs is None

    def num_needed(self, request: Request) -> int:
        """Return by how many pages `available` falls if a waiting request is admitted."""
        # Owned pages come first, since whoever owns a page owns its parents.
        owned = bisect(self.match(request), 0, key=lambda page: self._pages.owners(page) == 0)
        return self._num_pages(request.num_tokens) - owned

    def admit(self, request: Request) -> None:
        """Give a waiting request pages for all of its tokens, which must be available, those that it finds among them.

        Sets `num_computed`, `draft_lag` to the number of these tokens whose draft KV the pages lack, and, at the first
        admission, `cached_tokens`.
        """
        found = list(self.match(request))
        for index, page in enumerate(found):
            self._share(index, page)
        new = self._pages.reserve(self._num_pages(request.num_tokens) - len(found))
        assert new is not None
        request.matched.clear()
        request.num_indexed, request.num_drafted = len(found), self._num_drafted(found)
        request.num_computed = len(found) * self._page_size
        request.draft_lag = request.num_computed - request.num_drafted * self._page_size
        if request.scheduled is None and self._looks_up(request):
            request.cached_tokens = request.num_computed
            self.queries += request.num_prompt
            self.hits += request.num_computed
        self._append(request, found + new)

    def _num_drafted(self, pages: Sequence[int]) -> int:
        """Return the number of leading pages whose draft KV is computed."""
        if self._drafted is None:
            return 0
        return next((i for i, page in enumerate(pages) if page not in self._drafted), len(pages))

    def allocate(self, request: Request, slots: int) -> list[int] | None:
        """Extend a running request's pages to `slots` KV slots in total. Returns the new pages; None, and nothing
        changes, if too few are available."""
        if slots <= request.num_reserved:
            return []
        pages = self._pages.reserve(-(-(slots - request.num_reserved) // self._page_size))
        if pages is not None:
            self._append(request, pages)
        return pages

    def commit(self, request: Request) -> Sequence[tuple[int, int]]:
        """Enter the pages that are full of computed tokens into the index.

        Returns the pages that the request has adopted in place of its own: their places in its list, and the pages.
        """
        full = request.num_computed // self._page_size
        adopted: Sequence[tuple[int, int]] = ()
        if full > request.num_indexed and self._prefix and not request.is_private:
            adopted = self._add_to_index(request, full)
        if self._drafted is not None and not request.is_private:
            drafted = (request.num_computed - request.draft_lag) // self._page_size
            drafted = max(request.num_drafted, min(drafted, request.num_indexed))
            self._drafted.update(request.pages[request.num_drafted : drafted])
            request.num_drafted = drafted
        return adopted

    def _add_to_index(self, request: Request, full: int) -> list[tuple[int, int]]:
        """Enter the first `full` pages into the index, as far as they are not in it. Returns those that the request has
        adopted."""
        drafted_tokens = request.num_computed - request.draft_lag
        adopted = []
        self._index.extend(request.digests, request.salt, request.tokens, full)
        for place in range(request.num_indexed, full):
            own, known = request.pages[place], self._index.find(request.digests[place])
            if known is None:
                self._index.add(request.digests, place, own)
            elif self._drafted is not None and place * self._page_size < drafted_tokens and known not in self._drafted:
                request.is_private = True  # its draft KV would be lost: it keeps its own pages from here on
                break
            else:
                self._share(place, known)
                self._pages.release([own])
                if self.replaced is not None:
                    self.replaced.append(self._index.entry(known)._replace(page=own))
                request.pages[place] = known
                adopted.append((place, known))
            request.num_indexed += 1
        return adopted

    def release(self, request: Request) -> None:
        """Give back all pages of a running request."""
        for place, page in enumerate(request.pages[: request.num_indexed]):
            if self._pages.owners(page) > 1:
                self._count_shared(place, -1)
        self._pages.release(request.pages)
        request.pages, request.num_reserved = [], 0
        request.num_indexed = request.num_drafted = 0
        request.is_private = False

    def reset(self, requests: Iterable[Request]) -> None:
        """Forget all KV that the index names, and free the pages that nobody owns. requests: all there are."""
        self._index.clear()
        self._pages.drop_cached()
        if self._drafted is not None:
            self._drafted.clear()
        for request in requests:
            request.digests.clear()
            request.matched.clear()
            request.is_private = bool(request.pages)  # what running ones have computed stays their own

    def continue_counts(self, before: KVManager) -> None:
        """Take over the totals of the manager that this one replaces."""
        self.queries, self.hits, self._pages.evictions = before.queries, before.hits, before.evictions

    # -- pages -------------------------------------------------------------------------------------------------------

    def _num_pages(self, tokens: int) -> int:
        return -(-tokens // self._page_size)

    def _append(self, request: Request, pages: list[int]) -> None:
        request.pages += pages
        request.num_reserved += len(pages) * self._page_size

    def _share(self, place: int, page: int) -> None:
        """Add an owner to a page that is at `place` in its list."""
        self._pages.share(page)
        if self._pages.owners(page) > 1:
            self._count_shared(place, 1)

    def _count_shared(self, place: int, change: int) -> None:
        """Count owners beyond the first of a page. Who shares the last page of a stretch shares the whole stretch."""
        if self._stretch and (place + 1) % self._stretch == 0:
            self._num_shared_stretches += change

    def _forget(self, page: int) -> None:
        """Remove an evicted page from the index."""
        if page in self._index:
            self._index.remove(page)
        if self._drafted is not None:
            self._drafted.discard(page)

    def indexed_pages(self) -> list[IndexedPage]:
        """List all pages in the index."""
        return self._index.entries

    def check(self, requests: Iterable[Request]) -> None:
        """Raise PageLeak unless all pages are accounted for, and the index is as described above. requests: all there
        are, or those with pages."""
        listed = list(requests)
        self._pages.check(request.pages for request in listed)
        if self._prefix:
            self._check_index(listed)

    def _check_index(self, requests: Sequence[Request]) -> None:
        order = {page: i for i, page in enumerate(self._pages.eviction_order)}
        for page, *_ in self._index.entries:
            try:
                parent = self._index.parent(page)
            except KeyError:
                raise PageLeak(f"page {page} has outlived its parent in the index") from None
            if parent is not None and order.get(parent, len(order)) < order.get(page, len(order)):
                raise PageLeak(f"page {parent} would be evicted before its child, page {page}")
        for request in requests:
            for place, page in enumerate(request.pages):
                indexed = page in self._index and (
                    len(request.digests) > place and self._index.entry(page).digest == request.digests[place]
                )
                if indexed != (place < request.num_indexed and not self._was_reset(request)):
                    raise PageLeak(f"page {page} of {request.id!r} is {'' if indexed else 'not '}what the index names")

    def _was_reset(self, request: Request) -> bool:
        return request.is_private and not request.digests
