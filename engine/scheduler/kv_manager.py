"""KV manager: which request owns which pages, and which pages hold KV that another request can take over."""

from __future__ import annotations

from bisect import bisect
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from engine.scheduler.pages import PageAllocator, PageLeak
from engine.scheduler.prefix_index import IndexedPage, PrefixIndex
from engine.scheduler.request import Request
from engine.scheduler.sliding_pages import SlidingPages


class AdoptedPages(NamedTuple):
    """Pages that a request has adopted in place of its own, each with its place in the request's list. sliding: the
    same in the pool of sliding layers."""

    pages: list[tuple[int, int]]
    sliding: list[tuple[int, int]]


class KVManager:
    """Owner of all pages of the pool, target's and draft model's alike. A page is owned, cached or free.

    With a prefix index, a page enters it once a round has computed all of its tokens, whether prompt or output; drafts
    never do. If the index has that content already, the request adopts the indexed page and gives its own back. So

        the first `num_indexed` pages of a request are those that the index names for its tokens,

    rows that begin with the same tokens list the same pages, and whoever owns a page owns its parents. When a request
    is admitted, it takes over the pages that it finds (`match`, `admit`). Pages of requests that end or are preempted
    stay cached until they are evicted, least recently used first, children before parents.

    Where some layers slide, requests own pages of a second pool too (engine.scheduler.sliding_pages). A request takes
    over so many pages that those of the window before their end are there as well.

    queries, hits: prompt tokens looked up at first admissions, and those found. shared_tokens: KV tokens of decoding
    requests that attention need not read, because it reads the same pages for another one. num_distrusted: number of
    requests whose KV was forgotten because it may be wrong.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        *,
        prefix: bool = True,
        prompts_only: bool = False,
        num_uncached_tokens: int = 1,
        draft_pages: bool = False,
        shared_stretch: int = 0,
        sliding: SlidingPages | None = None,
    ) -> None:
        """prefix: whether there is a prefix index. prompts_only: whether it has pages of prompts only, because KV of
        output depends on where the prompt ended. num_uncached_tokens: number of tokens at the end of a request that
        it always computes itself. draft_pages: whether the pages also hold a draft model's KV, which requests compute
        later than the target's, or not at all. shared_stretch: see kernels.ops.Ops. sliding: owner of the pages of
        sliding layers; None: no layer slides.
        """
        self._page_size = page_size
        self._index = PrefixIndex(page_size)
        self._pages = PageAllocator(num_pages, self._index.pages, self._forget)
        self._prefix, self._prompts_only = prefix, prompts_only
        self._num_uncached_tokens = num_uncached_tokens
        self._drafted: set[int] | None = set() if draft_pages else None  # indexed pages whose draft KV is computed
        self._stretch = max(1, shared_stretch // page_size) if shared_stretch else 0  # in pages
        self._readers: dict[int, int] = {}  # number of decoding requests, by the last page of a stretch
        self._sliding = sliding
        self.queries = self.hits = self.shared_tokens = self.num_distrusted = 0

    # -- sizes -------------------------------------------------------------------------------------------------------

    @property
    def total(self) -> int:
        return self._pages.total

    @property
    def total_sliding(self) -> int:
        """Number of pages of the sliding pool; 0: there is none."""
        return 0 if self._sliding is None else self._sliding.allocator.total

    @property
    def owned_sliding(self) -> int:
        """Number of pages of the sliding pool that requests own."""
        return 0 if self._sliding is None else self._sliding.allocator.owned

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
    def owned(self) -> int:
        """Number of pages that requests own, sliding ones included."""
        return self._pages.owned + self.owned_sliding

    @property
    def evictions(self) -> int:
        """Number of cached pages, sliding ones too, that other requests were given."""
        return self._pages.evictions + (0 if self._sliding is None else self._sliding.allocator.evictions)

    def counters(self) -> dict[str, int]:
        """Return the fields of EngineStats that tell of pages."""
        pages, total_sliding, owned_sliding = self._pages, self.total_sliding, self.owned_sliding
        if self._sliding is not None and self._sliding.is_alone:
            pages, total_sliding, owned_sliding = self._sliding.allocator, 0, 0
        return {
            "pages_free": pages.free,
            "pages_cached": pages.cached,
            "sliding_pages_total": total_sliding,
            "sliding_pages_owned": owned_sliding,
            "prefix_queries": self.queries,
            "prefix_hits": self.hits,
            "prefix_evictions": self.evictions,
        }

    # -- requests ----------------------------------------------------------------------------------------------------

    def match(self, request: Request) -> Sequence[IndexedPage]:
        """Find the pages that a waiting request can take over: those of its first tokens."""
        if not self._looks_up(request):
            return ()
        matched, digests = request.matched, request.digests
        if request.matched_at != self._index.removals:
            # Pages found earlier may be gone: the last ones, since children leave the index before their parents.
            request.matched_at = self._index.removals
            places = range(len(matched))
            del matched[bisect(places, 0, key=lambda i: self._index.find(digests[i]) is not matched[i]) :]
        limit = max(0, min(request.num_tokens - self._num_uncached_tokens, self._indexable(request))) // self._page_size
        del digests[limit:]  # those of a preempted request may reach further
        while len(matched) < limit:  # digests reach one page further than the pages that are found
            self._index.extend(digests, request.salt, request.tokens, len(matched) + 1)
            entry = self._index.find(digests[len(matched)])
            if entry is None:
                break
            matched.append(entry)
        request.num_found = len(matched) if self._sliding is None else self._sliding.count_found(request)
        return matched if request.num_found == len(matched) else matched[: request.num_found]

    def _looks_up(self, request: Request) -> bool:
        """Whether a request takes over pages. Log-probabilities of a prompt need all of its tokens to be computed."""
        return self._prefix and request.params.prompt_logprobs is None

    def num_needed(self, request: Request) -> int:
        """Return by how many pages `available` falls if a waiting request is admitted."""
        # Owned pages come first, since whoever owns a page owns its parents.
        owned = bisect(self.match(request), 0, key=lambda entry: self._pages.owners(entry.page) == 0)
        return self._num_pages(request.num_tokens) - owned

    def num_fitting(self, requests: Sequence[Request]) -> int:
        """Return how many of these waiting requests, the first ones, the sliding pool has room for."""
        return len(requests) if self._sliding is None else self._sliding.num_fitting(requests)

    def admit(self, request: Request) -> None:
        """Give a waiting request pages for all of its tokens, which must be available, those that it finds among them.

        Sets `num_computed`, `draft_lag` to the number of these tokens whose draft KV the pages lack, and, at the first
        admission, `cached_tokens`.
        """
        found, branch = [entry.page for entry in self.match(request)], len(request.matched)
        for page in found:
            self._pages.share(page)
        new = self._pages.reserve(self._num_pages(request.num_tokens) - len(found))
        assert new is not None
        request.forget_matches()
        request.num_indexed, request.num_drafted = len(found), self._num_drafted(found)
        request.num_computed = len(found) * self._page_size
        request.draft_lag = request.num_computed - request.num_drafted * self._page_size
        if request.scheduled is None and self._looks_up(request):
            request.cached_tokens = request.num_computed
            self.queries += request.num_prompt
            self.hits += request.num_computed
        self._append(request, found + new)
        if self._sliding is not None:
            self._sliding.admit(request, branch)

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
        pages = self._pages.reserve(self._num_pages(slots - request.num_reserved))
        if pages is not None:
            self._append(request, pages)
        return pages

    def release_spare(self, running: Iterable[Request]) -> bool:
        """Give back the pages that running requests have for drafts, behind those of their tokens. False: none."""
        before = self.available
        for request in running:
            if spare := request.pages[self._num_pages(request.num_tokens) :]:
                del request.pages[-len(spare) :]
                request.num_reserved -= len(spare) * self._page_size
                self._pages.release(spare)
        return self.available > before

    def cover(self, request: Request, end: int) -> tuple[int, list[int]]:
        """Extend a running request's sliding pages to those of a round that computes positions up to end - 1, for which
        it has the other pages. Returns the place of the first new one, and the new ones."""
        return (0, []) if self._sliding is None else self._sliding.cover(request, end)

    def commit(self, request: Request) -> AdoptedPages:
        """Enter the pages that are full of computed tokens into the index, and release the sliding pages that nothing
        reads any more.

        The index names the same pages whether rows draft or not, so the draft KV of an adopted page may have to be
        computed again: `draft_lag` grows.
        """
        full = min(request.num_computed, self._indexable(request)) // self._page_size
        adopted = AdoptedPages([], [])
        if full > request.num_indexed and self._prefix and not request.is_private:
            adopted = self._add_to_index(request, full)
        if self._drafted is not None and not request.is_private:
            drafted = (request.num_computed - request.draft_lag) // self._page_size
            drafted = max(request.num_drafted, min(drafted, request.num_indexed))
            self._drafted.update(request.pages[request.num_drafted : drafted])
            request.num_drafted = drafted
        if self._stretch and request.num_counted < request.num_indexed and request.decoding:
            self._count_reader(request)
        if self._sliding is not None:
            self._sliding.trim(request)
            kept = [each for each in adopted.sliding if each[0] >= request.sliding_first]
            adopted = adopted._replace(sliding=kept)
        return adopted

    def _indexable(self, request: Request) -> int:
        """Return the number of first tokens whose KV the index can have."""
        return request.num_prompt if self._prompts_only else request.num_tokens

    def _add_to_index(self, request: Request, full: int) -> AdoptedPages:
        """Enter the first `full` pages into the index, as far as they are not in it. Returns those that the request has
        adopted."""
        adopted = AdoptedPages([], [])
        # One page more, so that others see what is computed next (prefill.find_waits).
        self._index.extend(
            request.digests, request.salt, request.tokens, min(full + 1, self._indexable(request) // self._page_size)
        )
        for place in range(request.num_indexed, full):
            if self._sliding is not None and (page := self._sliding.enter(request, place)) is not None:
                adopted.sliding.append((place, page))
            own, entry = request.pages[place], self._index.find(request.digests[place])
            if entry is None:
                self._index.add(request.digests, place, own)
                continue
            self._pages.share(entry.page)
            self._pages.release([own])
            self._index.note_given_back(own, entry)
            if self._drafted is not None and entry.page not in self._drafted:
                request.draft_lag = max(request.draft_lag, request.num_computed - place * self._page_size)
            request.pages[place] = entry.page
            adopted.pages.append((place, entry.page))
        request.num_indexed = full
        return adopted

    def _count_reader(self, request: Request) -> None:
        """Count a decoding request among the readers of its indexed pages. Who shares the last page of a stretch shares
        the whole stretch."""
        for page in self._stretch_ends(request, request.num_counted, request.num_indexed):
            readers = self._readers.get(page, 0)
            self._readers[page] = readers + 1
            self.shared_tokens += self._stretch * self._page_size * (readers > 0)
        request.num_counted = request.num_indexed

    def _stretch_ends(self, request: Request, first: int, end: int) -> list[int]:
        """Return the last page of each stretch of a request's pages that ends at places first … end - 1."""
        return request.pages[first + self._stretch - 1 - first % self._stretch : end : self._stretch]

    def distrust(self, request: Request, running: Sequence[Request]) -> None:
        """Forget the KV of a running request that has failed through no fault of its own, and all that was computed
        with it: what is wrong with it would fail others. Only pages that another request decodes with are known to be
        right. Where layers slide, all KV is forgotten: a sliding page may have another origin than the others of its
        tokens.

        running: all requests with pages. Those that own a forgotten page compute for themselves from now on.
        """
        if self._sliding is None:
            decoding = (other for other in running if other is not request and other.decoding)
            trusted = {page for other in decoding for page in other.pages[: other.num_indexed]}
            mine = request.pages[: request.num_indexed]
            wrong = {self._index.entry(page).digest for page in mine if page in self._index and page not in trusted}
        else:
            self._sliding.forget_all()
            wrong = {entry.digest for entry in self._index.entries}
        forgotten = set()
        for page, digest, parent, _ in self._index.entries:  # parents before children
            if digest in wrong or parent in wrong:
                wrong.add(digest)
                forgotten.add(page)
                if self._pages.owners(page) == 0:
                    self._pages.drop(page)
                else:
                    self._forget(page)
        for other in running:
            if self._sliding is not None or not forgotten.isdisjoint(other.pages):
                other.is_private = True
        self.num_distrusted += 1

    def release(self, request: Request) -> None:
        """Give back all pages of a running request."""
        if self._stretch:
            for page in self._stretch_ends(request, 0, request.num_counted):
                self._readers[page] -= 1
                if self._readers[page]:
                    self.shared_tokens -= self._stretch * self._page_size
                else:
                    del self._readers[page]
        self._pages.release(request.pages)
        request.pages, request.num_reserved = [], 0
        request.num_indexed = request.num_drafted = request.num_counted = 0
        request.is_private = False
        if self._sliding is not None:
            self._sliding.release(request)

    def reset(self, requests: Iterable[Request]) -> None:
        """Forget all KV that the index names, and free the pages that nobody owns. requests: all there are."""
        self._index.clear()
        self._pages.drop_cached()
        if self._sliding is not None:
            self._sliding.reset()
        if self._drafted is not None:
            self._drafted.clear()
        for request in requests:
            request.digests.clear()
            request.forget_matches()
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

    def _forget(self, page: int) -> None:
        """Remove a page from the index, if it is there."""
        if page in self._index:
            self._index.remove(page)
        if self._drafted is not None:
            self._drafted.discard(page)

    @property
    def indices(self) -> list[PrefixIndex]:
        """The prefix index of each pool: the one of sliding layers, if there are any, is the second."""
        return [self._index] if self._sliding is None else [self._index, self._sliding.index]

    def check(self, requests: Iterable[Request]) -> None:
        """Raise PageLeak unless all pages are accounted for, and the index is as described above. requests: all there
        are, or those with pages."""
        listed = list(requests)
        self._pages.check(request.pages for request in listed)
        if self._prefix:
            self._check_index(listed)
        if self._sliding is not None:
            self._sliding.check(listed)

    def _check_index(self, requests: Sequence[Request]) -> None:
        order = {page: i for i, page in enumerate(self._pages.eviction_order)}
        for entry in self._index.entries:
            if not entry.parent:
                continue
            parent = self._index.find(entry.parent)
            if parent is None:
                raise PageLeak(f"page {entry.page} has outlived its parent in the index")
            if parent.page in order and order[parent.page] < order.get(entry.page, len(order)):
                raise PageLeak(f"page {parent.page} would be evicted before its child, page {entry.page}")
        for request in requests:
            for place, page in enumerate(request.pages):
                indexed = page in self._index and (
                    len(request.digests) > place and self._index.entry(page).digest == request.digests[place]
                )
                if indexed != (place < request.num_indexed) and not request.is_private:
                    raise PageLeak(f"page {page} of {request.id!r} is {'' if indexed else 'not '}what the index names")
        counted = requests if self._stretch else ()
        ends = (self._stretch_ends(request, 0, request.num_counted) for request in counted)
        if Counter(page for pages in ends for page in pages) != self._readers:
            raise PageLeak("pages count other readers than they have")
