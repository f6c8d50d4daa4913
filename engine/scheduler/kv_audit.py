"""Audit of cached KV: a debug check that pages in the prefix indices hold what these say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from engine.scheduler.kv_manager import KVManager
from engine.scheduler.pages import PageLeak
from engine.scheduler.prefix_index import IndexedPage

_PAGES_PER_ROUND = 256
_MAX_HASHES = 1 << 16
"""Number of hashes after which all are forgotten, so that an engine can be audited for days."""


class _Sight(NamedTuple):
    """A page whose KV is hashed. slides: whether it is one of sliding layers."""

    slides: bool
    page: IndexedPage


class KVAudit:
    """Comparison of hashes of the KV in indexed pages, up to 256 of them per round, which ranks compute; pages of
    sliding layers are among them.

    A page's KV must not change while it is indexed. Where kernels are exact (a token's KV does not depend on what was
    computed beside it), pages of the same tokens must also have the same KV whenever and by whomever it is computed:
    before and after an eviction, or twice by two requests of which one adopts the other's page.
    """

    def __init__(self, kv: KVManager, *, exact: bool) -> None:
        self._kv, self._exact = kv, exact
        self._hashes: dict[tuple[bool, bytes | int], int] = {}
        self._expected: list[_Sight] = []
        self._next = self._num_distrusted = 0
        for index in kv.indices:
            index.list_given_back()

    def next_pages(self) -> tuple[list[int], list[int]]:
        """Choose the pages to hash before anything else happens in the next round. Returns those of the pool of all KV,
        and those of sliding layers."""
        indices = self._kv.indices
        indexed = [_Sight(slides > 0, page) for slides, index in enumerate(indices) for page in index.entries]
        given_back = [
            _Sight(slides > 0, page) for slides, index in enumerate(indices) for page in index.take_given_back()
        ]
        count = min(len(indexed), _PAGES_PER_ROUND)
        chosen = [indexed[(self._next + i) % len(indexed)] for i in range(count)]
        self._next += count
        if self._exact:
            chosen += given_back
        self._expected = sorted(chosen, key=lambda sight: sight.slides)
        full, sliding = (
            [sight.page.page for sight in self._expected if sight.slides == kind] for kind in (False, True)
        )
        return full, sliding

    def forget(self) -> None:
        """Forget all hashes: from now on the same tokens have other KV."""
        self._hashes.clear()
        self._expected = []
        for index in self._kv.indices:
            index.take_given_back()

    def compare(self, hashes: Sequence[int]) -> None:
        """Compare the hashes of `next_pages`, in its order. Raises PageLeak for a page whose KV is not what it was."""
        for (slides, page), found in zip(self._expected, hashes, strict=True):
            known = self._hashes.setdefault((slides, page.digest if self._exact else page.number), found)
            if known != found:
                raise PageLeak(f"{'sliding ' * slides}page {page.page} holds other KV than the index says")
        self._expected = []
        if len(self._hashes) > _MAX_HASHES or self._kv.num_distrusted != self._num_distrusted:
            self._num_distrusted = self._kv.num_distrusted
            self._hashes.clear()  # some may be of KV that was wrong
