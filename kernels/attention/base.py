"""The single attention primitive: ragged queries over paged KV."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from kernels.kv_cache import LayerKV


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """KV that each row's queries read; the same for all layers of a forward.

    Row r's queries are at the *end* of its KV ("causal at the bottom right"): with n queries over length L, query i
    sees the first L - n + i + 1 listed slots. A view that skips pages is a shorter list. Positions are not needed,
    because keys are rotated when they are written.

        pages[r]:  [ 7 | 3 | 9 ]          page_size 4, kv_lengths[r] = 10
        slots:      0123 4567 89..
        n = 3:      query 0 sees slots 0-7, query 1 sees 0-8, query 2 sees 0-9

    query_lengths: per row, number of queries; host integers, >= 1.
    kv_lengths: per row, KV slots listed, >= the row's query length; host integers.
    pages: [rows, width] int64 page ids, width * page_size >= max(kv_lengths); entries past a row's length are
        any valid page id. Or [rows, kv_heads, width], one list per KV head (all of a row's lists equally long).
    skipped: per row, number of tokens that its list leaves out, host integers; empty: none. Only attention that
        changes the positions of keys needs it (see kernels.attention.relative).
    """

    query_lengths: Sequence[int]
    kv_lengths: Sequence[int]
    pages: Tensor
    skipped: Sequence[int] = ()


class PlannedAttention(Protocol):
    """Exact softmax(q k^T * scale) v over the listed pages of a plan. One plan serves all layers of a forward."""

    def run(self, layer: LayerKV, q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Attend with the planned batch.

        q: [tokens, heads, head_dim], the queries of all rows concatenated. Head h reads KV head
        h // (heads / kv_heads). Returns o [tokens, heads, head_dim] in q's dtype, and the natural log-sum-exp of the
        scaled scores, [tokens, heads] in float32 (float64 for float64 queries), by which `merge_segments` combines
        segments.
        """
        ...


class AttentionBackend(PlannedAttention, Protocol):
    """Attention of eager forwards, whose shape may change from one to the next."""

    def plan(self, batch: AttentionBatch) -> None:
        """Prepare for `batch`. The plan stays valid until the next one."""


@dataclass(frozen=True, slots=True)
class GraphShape:
    """Shape of a captured forward: `rows` rows of exactly `queries` queries each, page lists of at most `width` pages.

    heads: number of KV heads that have lists of their own; None: one list for all.
    """

    rows: int
    queries: int
    width: int
    heads: int | None = None


class GraphAttention(PlannedAttention, Protocol):
    """Attention of a captured forward.

    Rows with fewer real queries are padded *in front*: row r's n real queries are its last ones, and its `kv_lengths`
    is that of the real ones, so a padding query sees fewer slots than the row's first real query, perhaps none. Results
    of padding queries are arbitrary, and do not disturb others'.

    pages: [rows, width] or [rows, heads, width] int64. lengths: [rows] int64, >= 1. Both at fixed addresses; the caller
        writes them before each `plan`.

    `run` takes q [rows * queries, heads, head_dim]. It is the only part that is captured, and reads buffers at fixed
    addresses.
    """

    pages: Tensor
    lengths: Tensor

    def plan(self, kv_lengths: Sequence[int]) -> None:
        """Prepare for the next capture or replay; never called while capturing.

        kv_lengths: host values of `lengths`. May enqueue device work that reads `pages` and `lengths`.
        """
