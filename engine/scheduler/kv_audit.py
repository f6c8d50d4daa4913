"""Audit of cached KV: a debug check that pages in the prefix index hold what the index says. Those of sliding
layers are not audited."""

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
    """A page whose KV is being hashed. key: what must have the same hash whenever it is seen."""

    page: IndexedPage
    key: bytes | int


class KVAudit:
    """Comparison of hashes of the KV in indexed pages, up to 256 of them per round, which ranks compute.

    A page's KV must not change while it is indexed. Where kernels are exact (a token's KV does not depend on what was
    computed beside it), pages of the same tokens must also have the same KV whenever and by whomever it is computed:
    before and after an eviction, or twice by two requests of which one adopts the other's page.
    """

    def __init__(self, kv: KVManager, *, exact: bool) -> None:
        self._kv, self._exact = kv, exact
        self._hashes: dict[bytes | int, int] = {}
        self._asked: list[_Sight] = []
        self._next = self._num_distrusted = 0
        kv.record_replaced()

    def next_pages(self) -> list[int]:
        """Choose the pages to hash before anything else happens in the next round."""
        indexed, replaced = self._kv.indexed_pages(), self._kv.take_replaced()
        count = min(len(indexed), _PAGES_PER_ROUND)
        chosen = [indexed[(self._next + i) % len(indexed)] for i in range(count)]
        self._next += count
        if self._exact:
            chosen += replaced
        self._asked = [_Sight(page, page.digest if self._exact else page.number) for page in chosen]
        return [page.page for page in chosen]

    def forget(self) -> None:
        """Forget all hashes: from now on the same tokens have other KV."""
        self._hashes.clear()
        self._asked = []
        self._kv.take_replaced()

    def compare(self, hashes: Sequence[int]) -> None:
        """Compare the hashes of `next_pages`. Raises PageLeak for a page whose KV is not what it was."""
        for sight, found in zip(self._asked, hashes, strict=True):
            known = self._hashes.setdefault(sight.key, found)
            if known != found:
                raise PageLeak(f"page {sight.page.page} holds other KV than the index says")
        self._asked = []
        if len(self._hashes) > _MAX_HASHES or self._kv.num_distrusted != self._num_distrusted:
            self._num_distrusted = self._kv.num_distrusted
            self._hashes.clear()  # some may be of KV that was wrong
