"""Prefix index: finds the page that holds the KV of given tokens after given others."""

from __future__ import annotations

import hashlib
import secrets
from array import array
from collections.abc import KeysView, Sequence
from itertools import count
from typing import NamedTuple


class IndexedPage(NamedTuple):
    """A page in the index. digest: stands for its content. parent: digest of the page before it; empty: there is none.
    number: different for every page that was ever added."""

    page: int
    digest: bytes
    parent: bytes
    number: int


class PrefixIndex:
    """Index of full pages of computed tokens, by a chain of digests.

        digest of page i = hash(key, digest of page i - 1, its token ids)        page -1: hash(key, salt)

    A digest stands for everything that decides the page's KV: the salt, and all tokens up to the page's end. The hash
    is keyed with random bytes that never leave the process, so nobody can construct tokens whose digest is another's.
    One page per digest, one digest per page. removals: rises when any page leaves the index.
    """

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._hash = _new_hash()
        self._by_digest: dict[bytes, IndexedPage] = {}
        self._by_page: dict[int, IndexedPage] = {}
        self._numbers = count()
        self._given_back: list[IndexedPage] | None = None
        self.removals = 0

    def __contains__(self, page: int) -> bool:
        return page in self._by_page

    def extend(self, chain: list[bytes], salt: str, tokens: Sequence[int], pages: int) -> None:
        """Append to a chain until it has the digests of the first `pages` pages of `tokens`, all full."""
        parent = chain[-1] if chain else self._root(salt)
        for first in range(len(chain) * self._page_size, pages * self._page_size, self._page_size):
            parent = self._digest(parent + array("i", tokens[first : first + self._page_size]).tobytes())
            chain.append(parent)

    def _digest(self, data: bytes) -> bytes:
        found = self._hash.copy()
        found.update(data)
        return found.digest()

    def _root(self, salt: str) -> bytes:
        return self._digest(b"salt" + salt.encode(errors="surrogatepass"))

    def find(self, digest: bytes) -> IndexedPage | None:
        """Return the page with this content: the same object as long as it is indexed; None: there is none."""
        return self._by_digest.get(digest)

    def add(self, chain: Sequence[bytes], index: int, page: int) -> None:
        """Add a page with the content of digest `index` of a chain. Neither may be in the index."""
        digest = chain[index]
        assert digest not in self._by_digest
        assert page not in self._by_page
        entry = IndexedPage(page, digest, chain[index - 1] if index else b"", next(self._numbers))
        self._by_digest[digest] = self._by_page[page] = entry

    def note_given_back(self, page: int, entry: IndexedPage) -> None:
        """Record that a request has given back a page for the indexed one with the same content."""
        if self._given_back is not None:
            self._given_back.append(entry._replace(page=page))

    def list_given_back(self) -> None:
        """Record from now on which pages requests give back for indexed ones, for `take_given_back`."""
        self._given_back = []

    def take_given_back(self) -> list[IndexedPage]:
        """Return those given back since the last call. They hold the same KV as the indexed ones until the next
        round."""
        given_back, self._given_back = self._given_back or [], []
        return given_back

    def remove(self, page: int) -> None:
        del self._by_digest[self._by_page.pop(page).digest]
        self.removals += 1

    def clear(self) -> None:
        """Forget all pages. Chains made before are of no use afterwards."""
        self._by_digest.clear()
        self._by_page.clear()
        self.removals += 1
        self._hash = _new_hash()

    def entry(self, page: int) -> IndexedPage:
        return self._by_page[page]

    @property
    def pages(self) -> KeysView[int]:
        """All indexed pages, at any time."""
        return self._by_page.keys()

    @property
    def entries(self) -> list[IndexedPage]:
        """All indexed pages, in the order in which they were added."""
        return list(self._by_page.values())


def _new_hash() -> hashlib.blake2b:
    """Return an empty hash with a key of its own."""
    return hashlib.blake2b(digest_size=32, key=secrets.token_bytes(32))
