"""Pages that rows share, read once: when that pays, and the two segments of such a batch.

Attention to a row's KV is attention to the shared pages and to what follows them, merged by log-sum-exp (Bifurcated
attention, arXiv 2403.08845). The first segment has one row per prefix, with the queries of all of its rows, which all
see all of it; the second is the batch as it was, with lists that begin after the shared pages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.attention.base import SharedPrefix
from kernels.attention.reference_attention import merge_segments
from kernels.flashinfer.flashinfer_sizes import Heads
from kernels.ragged import Ints, ragged_arange

LAUNCH_BYTES = 48 << 20
"""KV that a device reads while it launches a few more kernels (one for the queries of prefixes, one to attend, one to
merge): 10 µs at 4.8 TB/s, an H200's bandwidth. Slower memory reads less in that time, so that sharing begins a little
late there, never too early. An estimate, not a measurement."""

MergePrefixes = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
"""Signature of merge_prefixes."""


def saved_pages(prefixes: Sequence[SharedPrefix]) -> int:
    """Return the number of pages that need not be read again."""
    return sum((len(each.rows) - 1) * each.pages for each in prefixes)


def pays(prefixes: Sequence[SharedPrefix], page_size: int, heads: Heads, itemsize: int, tokens: int) -> bool:
    """Whether reading shared pages once takes less time than it saves, in one layer:

        saved pages * bytes of a page > LAUNCH_BYTES + bytes of the merge

    The merge writes and reads the results of two segments for all queries, in float32. itemsize: bytes of a number in
    the pool. tokens: number of queries of the batch.
    """
    page = 2 * page_size * heads.kv_heads * heads.head_dim * itemsize
    merge = 2 * 2 * tokens * heads.heads * (heads.head_dim + 1) * 4
    return bool(prefixes) and saved_pages(prefixes) * page > LAUNCH_BYTES + merge


def largest(prefixes: Sequence[SharedPrefix], count: int) -> list[SharedPrefix]:
    """Return the `count` prefixes that save most."""
    return sorted(prefixes, key=lambda each: saved_pages([each]), reverse=True)[:count]


@dataclass(frozen=True, slots=True)
class PrefixSegment:
    """The first segment of a batch, on the host.

    rows: [prefixes], index of a row that lists the prefix. pages, queries: [prefixes], its number of pages and of
    queries. tokens: [sum of queries], indices of these queries in the batch, prefix by prefix. skipped: [rows of the
    batch], number of first pages that the second segment leaves out.
    """

    rows: Ints
    pages: Ints
    queries: Ints
    tokens: Ints
    skipped: Ints

    def places(self, tokens: int) -> Ints:
        """Return the index in `tokens` of each query of the batch, -1 for those without a prefix. tokens: their
        number."""
        places = np.full(tokens, -1, dtype=np.int64)
        places[self.tokens] = np.arange(len(self.tokens))
        return places


def first_segment(prefixes: Sequence[SharedPrefix], queries: Ints) -> PrefixSegment:
    """Lay out the first segment. queries: [rows], number of queries of each row."""
    members = np.array([row for each in prefixes for row in each.rows], dtype=np.int64)
    sizes = np.array([len(each.rows) for each in prefixes], dtype=np.int64)
    pages = np.array([each.pages for each in prefixes], dtype=np.int64)
    first = sizes.cumsum() - sizes
    counts = queries[members]
    starts = queries.cumsum() - queries
    skipped = np.zeros_like(queries)
    skipped[members] = np.repeat(pages, sizes)
    return PrefixSegment(
        rows=members[first],
        pages=pages,
        queries=np.add.reduceat(counts, first) if len(first) else first,
        tokens=np.repeat(starts[members], counts) + ragged_arange(counts),
        skipped=skipped,
    )


def second_segment(pages: Tensor, skipped: Tensor) -> Tensor:
    """Return lists that begin after the shared pages. pages: [rows, width]. skipped: [rows], as in PrefixSegment."""
    width = pages.shape[1]
    columns = torch.arange(width, device=pages.device) + skipped[:, None]
    return pages.gather(1, columns.clamp_(max=width - 1))


def merge_prefixes(out: Tensor, lse: Tensor, places: Tensor, of_prefixes: Tensor, of_prefixes_lse: Tensor) -> None:
    """Merge the first segment into the second, in place, in shapes that do not depend on values.

    out: [tokens, heads, head_dim] and lse: [tokens, heads], of the second. places: [tokens] int64, see
    PrefixSegment.places. of_prefixes, of_prefixes_lse: of the first.
    """
    has = places >= 0
    place = places.clamp(min=0)
    merged, total = merge_segments([out, of_prefixes[place]], [lse, of_prefixes_lse[place]])
    out.copy_(torch.where(has[:, None, None], merged, out))
    lse.copy_(torch.where(has[:, None], total, lse))


def merge_sinks(out: Tensor, lse: Tensor, sinks: Tensor, merge: MergePrefixes = merge_prefixes) -> None:
    """Merge a layer's sinks into attention without them, in place: a segment of one slot per head, whose value is zero,
    which all queries share. out, lse: see merge_prefixes. sinks: [heads] in lse's dtype."""
    places = torch.zeros(len(out), dtype=torch.int64, device=out.device)
    merge(out, lse, places, out.new_zeros(1, *out.shape[1:]), sinks[None])
