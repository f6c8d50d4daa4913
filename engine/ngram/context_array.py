"""Positions of a text, sorted by the tokens before them: an index of what followed every context.

It is the suffix array of the reversed text, to a depth of MAX_MATCH tokens. The positions whose contexts have the most
last tokens in common with a given one are neighbours of the place where that one would be sorted in, so one binary
search finds the longest match of any length.
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

MAX_MATCH = 16
"""Last tokens of a context that are compared."""
_TOKEN_BYTES = 4

Buffer = bytes | memoryview


def pack_reversed(tokens: npt.ArrayLike) -> npt.NDArray[np.uint32]:
    """Return tokens in reverse, big-endian: their bytes then compare as the tokens do. tokens: [n], of 32 bits."""
    return np.asarray(tokens, dtype=np.uint32)[::-1].astype(">u4")


def sort_contexts(reversed_tokens: npt.NDArray[np.uint32]) -> npt.NDArray[np.int64]:
    """Sort the suffixes of a reversed text by their first MAX_MATCH tokens; equal ones from the end of the text to its
    beginning. Doubles the sorted depth until it is reached (Manber and Myers): O(n log n) for each doubling.

    Returns [n], first index of each suffix.
    """
    count = len(reversed_tokens)
    if not count:
        return np.zeros(0, dtype=np.int64)
    _, rank = np.unique(reversed_tokens, return_inverse=True)
    order = np.argsort(rank, kind="stable")
    depth = 1
    while depth < MAX_MATCH:
        later = np.zeros(count, dtype=np.int64)  # 0: past the end, before every token
        later[: max(0, count - depth)] = rank[depth:] + 1
        key = rank * (count + 1) + later
        order = np.argsort(key, kind="stable")
        ordered = key[order]
        rank = np.empty(count, dtype=np.int64)
        rank[order] = np.concatenate([[0], np.cumsum(ordered[1:] != ordered[:-1])])
        depth *= 2
    return order


class ContextArray:
    """Index of one text, which does not change. Its arrays may be memory-mapped."""

    def __init__(self, reversed_bytes: Buffer, order: memoryview) -> None:
        """reversed_bytes: of `pack_reversed`. order: [n] integers, see sort_contexts."""
        self._bytes = reversed_bytes
        self._order = order
        self._count = len(order)

    @classmethod
    def build(cls, tokens: npt.ArrayLike) -> ContextArray:
        """Index tokens, [n]. Takes 8 bytes for each."""
        packed = pack_reversed(tokens)
        return cls(packed.tobytes(), sort_contexts(packed).astype(np.int32).data)

    def __len__(self) -> int:
        return self._count

    @property
    def num_bytes(self) -> int:
        return len(self._bytes) + self._order.nbytes

    def tokens(self, first: int, count: int) -> tuple[int, ...]:
        """Return up to `count` tokens of the text from a position on; fewer at its end."""
        count = max(0, min(count, self._count - first))
        end = _TOKEN_BYTES * (self._count - first)
        return struct.unpack(f">{count}I", self._bytes[end - _TOKEN_BYTES * count : end])[::-1]

    def matches(self, context: Sequence[int], minimum: int, limit: int) -> Iterator[tuple[int, int]]:
        """Find positions before which the last tokens of `context` stand.

        minimum: smallest number of tokens that must be the same. limit: largest number of positions on each side of the
        place where the context would be. Yields (position, tokens that are the same, up to MAX_MATCH), those with more
        first on each side. The position after the text's last token is none: nothing followed it.
        """
        wanted = b"".join(token.to_bytes(_TOKEN_BYTES, "big") for token in reversed(context[-MAX_MATCH:]))
        place = bisect_left(self._order, wanted, key=self._context)
        for step, first in ((1, place), (-1, place - 1)):
            index, left = first, limit
            while 0 <= index < self._count and left:
                same = _common_tokens(wanted, self._context(self._order[index]))
                if same < minimum:
                    break
                if self._order[index]:  # the reversed text's first suffix ends the text
                    left -= 1
                    yield self._count - self._order[index], same
                index += step

    def _context(self, suffix: int) -> bytes:
        at = _TOKEN_BYTES * suffix
        return bytes(self._bytes[at : at + _TOKEN_BYTES * MAX_MATCH])


def _common_tokens(a: bytes, b: bytes) -> int:
    """Count the tokens that both begin with."""
    size = min(len(a), len(b))
    if a[:size] == b[:size]:
        return size // _TOKEN_BYTES
    differing = int.from_bytes(a[:size], "big") ^ int.from_bytes(b[:size], "big")
    return (8 * size - differing.bit_length()) // (8 * _TOKEN_BYTES)
