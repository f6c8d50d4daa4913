"""Sharding: pure functions from sizes and rank counts to index ranges."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple


class Range(NamedTuple):
    """Indices start … stop - 1 of one dimension."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def slice(self, unit: int = 1) -> slice:
        """Return the range as a slice, with `unit` consecutive elements per index."""
        return slice(self.start * unit, self.stop * unit)


def split(total: int, parts: int) -> list[Range]:
    """Cut 0 … total - 1 into contiguous parts whose sizes differ by at most one, the larger ones first.

    Raises ValueError unless 1 <= parts <= total: no part is empty.
    """
    if not 1 <= parts <= total:
        raise ValueError(f"cannot split {total} into {parts} non-empty parts")
    small, larger = divmod(total, parts)
    bounds = [part * small + min(part, larger) for part in range(parts + 1)]
    return [Range(start, stop) for start, stop in pairwise(bounds)]


class HeadSplit(NamedTuple):
    """One rank's attention heads. Each of its KV heads serves the same number of its query heads.

    heads: query heads; each belongs to exactly one rank.
    kv_heads: KV heads that those query heads read. With more ranks than KV heads, several ranks hold the same one.

        9 query heads over 3 KV heads (0-2 read 0, 3-5 read 1, 6-8 read 2):
        2 ranks:  [0-5 | 0,1] [6-8 | 2]
        4 ranks:  [0,1 | 0] [2 | 0] [3-5 | 1] [6-8 | 2]
    """

    heads: Range
    kv_heads: Range


def split_heads(num_heads: int, num_kv_heads: int, ranks: int) -> list[HeadSplit]:
    """Assign attention heads to ranks; entry r is rank r's.

    Up to num_kv_heads ranks: each rank gets whole KV heads with all their query heads, as evenly as possible.
    Beyond that: each rank gets one KV head. The ranks are split over the KV heads, and the query heads of a KV head are
    split over its ranks.
    Raises ValueError if num_heads is not a multiple of num_kv_heads, or unless 1 <= ranks <= num_heads.
    """
    if num_kv_heads < 1 or num_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads cannot share {num_kv_heads} KV heads evenly")
    if not 1 <= ranks <= num_heads:
        raise ValueError(f"{num_heads} query heads cannot be split over {ranks} ranks: each rank needs at least one")
    group = num_heads // num_kv_heads
    if ranks <= num_kv_heads:
        return [HeadSplit(Range(kv.start * group, kv.stop * group), kv) for kv in split(num_kv_heads, ranks)]
    return [
        HeadSplit(Range(kv * group + part.start, kv * group + part.stop), Range(kv, kv + 1))
        for kv, members in enumerate(split(ranks, num_kv_heads))
        for part in split(group, members.size)
    ]
