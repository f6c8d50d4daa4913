"""Rows whose page lists begin alike, found on the host from its own copy of the lists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from kernels.attention.base import SharedPrefix
from kernels.ragged import Ints

_LEVELS = 8
"""Levels of a tree of beginnings that are told apart: rows that share a system prompt, of these rows that share a
document, and so on. Below the last level, rows count as sharing no more than it. Bounds the work for chains in which
each row shares a little more than the one before."""


_KEPT = 64
"""Batches, and limits of each, whose prefixes are kept."""


@dataclass(slots=True)
class _Found:
    """Prefixes of a batch while no list has changed where rows agree. reach: [rows], largest number of first pages that
    each shares with another. prefixes: by the limits, none beyond its row's reach."""

    reach: Ints
    prefixes: dict[bytes, list[SharedPrefix]] = field(default_factory=dict)


@dataclass(slots=True)
class _Node:
    """Rows that list the same first `depth` pages. single: those that share no more with any other. children: sets of
    rows that do."""

    depth: int
    single: list[int] = field(default_factory=list)
    children: list[_Node] = field(default_factory=list)


@dataclass(slots=True)
class _Choice:
    """Prefixes chosen in the subtree of a node. saved: pages that its rows need not read, given that its ungrouped rows
    join a prefix above. ungrouped: rows in none of `groups`."""

    saved: int
    ungrouped: list[int]
    groups: list[SharedPrefix]


class PageLists:
    """Host copy of the page lists of all row slots.

    The number of first pages that two rows share is kept until a change may have altered it, and so is the choice for a
    batch. So a round costs O(rows + changes): only rows that are new to each other, or one of which has changed where
    they agreed, are compared page by page.
    """

    def __init__(self, max_rows: int, max_pages: int) -> None:
        self._pages = np.zeros((max_rows, max_pages), dtype=np.int64)
        self._counts = [0] * max_rows
        # By row, then by other row: number of first pages that both list.
        self._common: list[dict[int, int]] = [{} for _ in range(max_rows)]
        self._found: dict[bytes, _Found] = {}

    def clear(self, row: int) -> None:
        """Empty the list of a row slot, for the next request."""
        self._forget(row, 0)
        self._counts[row] = 0
        self._found.clear()

    def write(self, row: int, first: int, pages: Sequence[int]) -> None:
        """Set the pages of a row from index `first` on."""
        self._forget(row, first)
        self._pages[row, first : first + len(pages)] = pages
        self._counts[row] = max(self._counts[row], first + len(pages))

    def prefixes(self, rows: Ints, limits: Ints) -> list[SharedPrefix]:
        """Choose the prefixes of a batch, each row in one of them at most, so that most pages are saved: the sum of
        (rows - 1) * pages.

        rows: [n] row slots. limits: [n], number of first pages of each row that may be shared. The result names rows by
        their index in `rows`.
        """
        found = self._found.get(rows.tobytes())
        if found is None:
            if len(self._found) >= _KEPT:
                self._found.clear()
            found = self._found[rows.tobytes()] = _Found(self._reach(rows.tolist()))
        limits = np.minimum(limits, found.reach)
        key = limits.tobytes()
        if key not in found.prefixes:
            if len(found.prefixes) >= _KEPT:
                found.prefixes.clear()
            trees = self._trees(rows.tolist(), limits.tolist())
            found.prefixes[key] = [prefix for tree in trees for prefix in _choose(tree, 0).groups]
        return found.prefixes[key]

    def _reach(self, slots: list[int]) -> Ints:
        """Return the largest number of first pages that each row shares with another."""
        reach = np.zeros(len(slots), dtype=np.int64)
        if len(set(slots)) < len(slots):  # of a slot's several rows, none is shared
            return reach
        nodes = self._trees(slots, [self._counts[slot] for slot in slots])
        while nodes:
            node = nodes.pop()
            reach[node.single] = node.depth
            nodes += node.children
        return reach

    def _trees(self, slots: list[int], most: list[int]) -> list[_Node]:
        """Build the trees of rows that list the same first page. most: number of first pages of each row that count."""
        starts: dict[int, list[int]] = {}
        for index, page in enumerate(self._pages[slots, 0].tolist()):
            if most[index] > 0:
                starts.setdefault(page, []).append(index)
        return [self._tree(members, slots, most, 1) for members in starts.values() if len(members) > 1]

    def _tree(self, members: list[int], slots: list[int], most: list[int], level: int) -> _Node:
        """Build the tree of rows that list the same first page. members: at least two of them."""
        first = members[0]
        depth = min(most[first], *(min(most[other], self._shared(slots[first], slots[other])) for other in members[1:]))
        longer = [index for index in members if most[index] > depth] if level < _LEVELS else []
        following: dict[int, list[int]] = {}
        if longer:
            column = self._pages[[slots[index] for index in longer], depth].tolist()
            for index, page in zip(longer, column, strict=True):
                following.setdefault(page, []).append(index)
        alike = [each for each in following.values() if len(each) > 1]
        inside = {index for each in alike for index in each}
        single = [index for index in members if index not in inside]
        return _Node(depth, single, [self._tree(each, slots, most, level + 1) for each in alike])

    def _shared(self, row: int, other: int) -> int:
        """Return the number of first pages that two rows share."""
        common = self._common[row].get(other)
        if common is None:
            count = min(self._counts[row], self._counts[other])
            differs = self._pages[row, :count] != self._pages[other, :count]
            at = int(differs.argmax())
            common = at if differs[at] else count
            self._common[row][other] = self._common[other][row] = common
        return common

    def _forget(self, row: int, first: int) -> None:
        """Forget what a change of the row's pages from index `first` on may alter."""
        known = self._common[row]
        changed = [other for other, common in known.items() if common >= first]
        for other in changed:
            del known[other], self._common[other][row]
        if changed or first == 0:
            self._found.clear()


def _choose(node: _Node, above: int) -> _Choice:
    """Choose prefixes in a subtree. above: pages of the prefix that ungrouped rows will join; 0: none."""
    apart = [_choose(child, above) for child in node.children]
    skipped = _Choice(
        sum(each.saved for each in apart) + above * len(node.single),
        node.single + [index for each in apart for index in each.ungrouped],
        [group for each in apart for group in each.groups],
    )
    below = [_choose(child, node.depth) for child in node.children]
    rows = node.single + [index for each in below for index in each.ungrouped]
    # The rows of a prefix save its pages once each, but for one of them.
    saved = sum(each.saved for each in below) + node.depth * len(node.single) - node.depth
    if len(rows) < 2 or saved <= skipped.saved:
        return skipped
    groups = [group for each in below for group in each.groups]
    return _Choice(saved, [], [SharedPrefix(tuple(sorted(rows)), node.depth), *groups])
