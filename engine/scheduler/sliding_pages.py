"""Pages of sliding layers, whose KV is kept for a window of recent tokens only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from engine.config.deployment import EngineConfig
from engine.scheduler.pages import PageAllocator, PageLeak
from engine.scheduler.prefix_index import PrefixIndex
from engine.scheduler.request import Request
from models.model_config import ModelConfig
from models.shapes import window_pages_per_row


class WindowRoom(NamedTuple):
    """Pages of the sliding pool that are owned at most. of_row: by a row, besides those that all rows' new tokens of a
    round fill. of_round: these."""

    of_row: int
    of_round: int

    def pages(self, rows: int, tokens: int) -> int:
        """Return the number of pages that `rows` rows with `tokens` pages of tokens in all need at most."""
        return min(tokens, rows * self.of_row + self.of_round)


class SlidingPages:
    """Owner of the pages of the sliding pool. A page is owned, cached or free.

    Place i of a request's pages has positions i * page_size … (i + 1) * page_size - 1, as in the pool of the other
    layers. A query reads its own position and the window - 1 before it. So a request owns the pages of a stretch of
    places:

        computed - window + 1 …                     what its next query reads first
        … end                                       the last position that a planned round writes (`cover`)

    A page that falls behind is released as soon as the tokens that need it are computed (`trim`). With a prefix index
    it enters the index under the same digest as the page of the other layers, and at the same time; where the index has
    the content, the request adopts the indexed page, in each pool by itself. An owned page stays indexed until all is
    forgotten. So different sliding pages that are owned belong to different owned pages of the other layers, and a pool
    of as many pages, or of as many as windows and rounds need (WindowRoom), is never too small. Where all layers slide,
    the other pool has no bytes and many pages: there only as many requests run as this pool has room for, even if each
    of them becomes as long as it may (`num_fitting`).

    Most pages that fall behind serve no one: another request takes over only those of a window before the end of what
    it has in common. So these are kept longer: before the end of a prompt, of all tokens, and of what a request was
    found to have in common with one before it.

    index: names pages by what they hold. allocator: of the pool's pages.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        window: int,
        num_uncached_tokens: int = 1,
        room: WindowRoom | None = None,
    ) -> None:
        """num_pages: see pool_pages. window: positions that a query reads, its own included. num_uncached_tokens: see
        KVManager. room: bounds what running requests need; None: the other pool does."""
        self._page_size, self._window, self._num_uncached_tokens = page_size, window, num_uncached_tokens
        self._room, self._running, self._longest = room, 0, 0
        self.index = PrefixIndex(page_size)
        self.allocator = PageAllocator(num_pages, self.index.pages, self._forget)

    @property
    def is_alone(self) -> bool:
        """Whether all layers slide, so that this pool has all KV."""
        return self._room is not None

    # -- requests ----------------------------------------------------------------------------------------------------

    def count_found(self, request: Request) -> int:
        """Return how many of a waiting request's `matched` pages it can take over: as many that the window before their
        end is indexed too."""
        before, after = request.matched_window, (len(request.matched), self.index.removals)
        if (
            before[0] != after[0]
            or any(self.index.find(request.digests[place]) is not None for place in request.missing_pages)
            or (before != after and not self._has_window(request.digests, request.num_found))
        ):
            request.num_found, request.missing_pages = self._longest_hit(request.digests, after[0])
        request.matched_window = after
        return request.num_found

    def _has_window(self, digests: Sequence[bytes], pages: int) -> bool:
        places = range(self._window_start(pages * self._page_size), pages)
        return all(self.index.find(digests[place]) is not None for place in places)

    def _longest_hit(self, digests: Sequence[bytes], pages: int) -> tuple[int, tuple[int, ...]]:
        """Return the largest number of pages, at most `pages`, such that the window before their end is indexed, and
        the first and the last place that was missing for more: once another request enters one, there may be."""
        place, missing = pages, []
        while place > self._window_start(pages * self._page_size):
            place -= 1
            if self.index.find(digests[place]) is None:
                pages = place
                missing.append(place)
        return pages, tuple(missing[:1] + missing[1:][-1:])

    def num_fitting(self, requests: Sequence[Request]) -> int:
        """Return how many of these waiting requests, the first ones, have room beside those that run."""
        if self._room is None:
            return len(requests)
        tokens = self._longest
        for count, request in enumerate(requests, 1):
            tokens += self._most_pages(request)
            if self._room.pages(self._running + count, tokens) > self.allocator.total:
                return count - 1
        return len(requests)

    def _most_pages(self, request: Request) -> int:
        """Return the number of pages of all tokens that a request can have."""
        return -(-(request.num_prompt + request.params.max_tokens) // self._page_size)

    def admit(self, request: Request, branch: int) -> None:
        """Give a request the pages of the window before its computed tokens' end, which are indexed. branch: number of
        first pages that it has in common with another request."""
        self._running, self._longest = self._running + 1, self._longest + self._most_pages(request)
        request.sliding_first = self._window_start(request.num_computed)
        request.sliding_branch = branch
        digests = request.digests[request.sliding_first : request.num_computed // self._page_size]
        entries = [self.index.find(digest) for digest in digests]
        request.sliding_pages = [entry.page for entry in entries if entry is not None]
        assert len(request.sliding_pages) == len(digests)
        for page in request.sliding_pages:
            self.allocator.share(page)

    def cover(self, request: Request, end: int) -> tuple[int, list[int]]:
        """Give a running request the pages of positions up to end - 1. Returns the place of the first new one, and the
        new ones."""
        first = request.sliding_first + len(request.sliding_pages)
        pages = self.allocator.reserve(max(0, -(-end // self._page_size) - first))
        assert pages is not None, "windows and rounds need more pages than there are"
        request.sliding_pages += pages
        return first, pages

    def enter(self, request: Request, place: int) -> int | None:
        """Enter the page of a place into the index, or adopt the indexed one. Returns the adopted one; None: there was
        none."""
        index = place - request.sliding_first
        assert index >= 0
        own, entry = request.sliding_pages[index], self.index.find(request.digests[place])
        if entry is None:
            self.index.add(request.digests, place, own)
            return None
        self.allocator.share(entry.page)
        self.allocator.release([own])
        self.index.note_given_back(own, entry)
        request.sliding_pages[index] = entry.page
        return entry.page

    def trim(self, request: Request) -> None:
        """Release the pages that a running request's next queries do not read."""
        behind = self._window_start(request.num_computed) - request.sliding_first
        for place, page in enumerate(request.sliding_pages[: max(0, behind)], request.sliding_first):
            self.allocator.release([page], spent=not self._is_useful(request, place))
        if behind > 0:
            del request.sliding_pages[:behind]
            request.sliding_first += behind

    def _is_useful(self, request: Request, place: int) -> bool:
        """Whether a page is part of a window that another request may begin after."""
        size, length, branch = self._page_size, request.num_prompt, request.sliding_branch
        # The same prompt again computes its last tokens itself.
        reused = max(0, length - self._num_uncached_tokens) // size * size
        before_end = self._window_start(reused) <= place < length // size
        return before_end or self._window_start(branch * size) <= place < branch

    def release(self, request: Request) -> None:
        """Give back all pages of a running request."""
        self._running, self._longest = self._running - 1, self._longest - self._most_pages(request)
        self.allocator.release(request.sliding_pages[::-1])
        request.sliding_pages, request.sliding_first = [], 0

    def reset(self) -> None:
        """Forget all KV that the index names, and free the pages that nobody owns."""
        self.index.clear()
        self.allocator.drop_cached()

    def forget_all(self) -> None:
        """Forget what the index names, which may be wrong; digests stay those of their tokens."""
        self.allocator.drop_cached()
        for entry in self.index.entries:
            self._forget(entry.page)

    # -- pages -------------------------------------------------------------------------------------------------------

    def _window_start(self, computed: int) -> int:
        """Return the place of the first position that a query at `computed` reads."""
        return max(0, computed - self._window + 1) // self._page_size

    def _forget(self, page: int) -> None:
        if page in self.index:
            self.index.remove(page)

    def check(self, requests: Iterable[Request]) -> None:
        """Raise PageLeak unless all pages are accounted for, each request has the window of its computed tokens, and
        different sliding pages belong to different pages of the other layers."""
        listed = list(requests)
        self.allocator.check(request.sliding_pages for request in listed)
        belongs: dict[int, int] = {}
        for request in listed:
            if not request.pages:
                continue
            first, end = request.sliding_first, request.sliding_first + len(request.sliding_pages)
            if first > self._window_start(request.num_computed) or end * self._page_size < request.num_computed:
                raise PageLeak(f"request {request.id!r} lacks the window before position {request.num_computed}")
            for page, other in zip(request.sliding_pages, request.pages[first:], strict=False):
                if belongs.setdefault(page, other) != other:
                    raise PageLeak(f"sliding page {page} belongs to pages {belongs[page]} and {other}")
        if len(set(belongs.values())) != len(belongs):
            raise PageLeak("several sliding pages belong to one page")


class PoolPages(NamedTuple):
    """Numbers of pages. full: of the pool of layers that keep the KV of all tokens. sliding: of that of sliding layers;
    0: there are none."""

    full: int
    sliding: int


def pool_pages(config: EngineConfig, model: ModelConfig, num_pages: int, max_model_len: int) -> PoolPages:
    """Return the sizes of a model's pools. num_pages: of the first, of which a row owns at least as many as of the
    second. Where no layer keeps the KV of all tokens, it is that of the second, and the first, which has no bytes, has
    all pages that rows can list."""
    if not model.attention_groups[0]:
        return PoolPages(config.scheduler.max_rows * (-(-max_model_len // config.cache.page_size) + 1), num_pages)
    window = model.windows[1]
    return PoolPages(num_pages, min(num_pages, max_sliding_pages(config, window)) if window else 0)


def window_room(config: EngineConfig, window: int) -> WindowRoom:
    """Return the pages that windows and rounds need at most."""
    page = config.cache.page_size
    of_row = window_pages_per_row(window, config.speculation.max_draft_tokens, page)
    return WindowRoom(of_row, -(-config.scheduler.max_batch_tokens // page))


def max_sliding_pages(config: EngineConfig, window: int) -> int:
    """Return the number of pages that all rows together need at most, however long they are."""
    rows, room = config.scheduler.max_rows, window_room(config, window)
    return rows * room.of_row + room.of_round


def make_sliding_pages(config: EngineConfig, model: ModelConfig, num_pages: int) -> SlidingPages | None:
    """Make the owner of sliding pages; None for a model without. num_pages: of the sliding pool."""
    window, alone = model.windows[1], not model.attention_groups[0]
    room = window_room(config, window) if alone else None
    uncached = config.speculation.num_uncached_tokens
    return SlidingPages(num_pages, config.cache.page_size, window, uncached, room) if window else None
