"""The single attention primitive: ragged queries over paged KV."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from kernels.kv.kv_pool import LayerKV


class SharedPrefix(NamedTuple):
    """Rows of a batch whose lists begin with the same pages. rows: their indices, at least two. pages: the number of
    those pages; every query of these rows sees all of their slots, and at least one after them."""

    rows: tuple[int, ...]
    pages: int


@dataclass(frozen=True, slots=True)
class Ballot:
    """Votes of up to two queries of each row for the KV that the row lists: the weights that they give to it.

    Each run overwrites `votes`, so that they are those of the layer that ran last. Voting changes no bit of a result.

    voters: [rows, 2] int64, contiguous, places of the voters, counted back from their row's last query (0: the last
        one), -1: none. A row that votes with one query has it in the first column.
    unit: number of consecutive listed slots that share a vote: a divisor of the page size, or the page size.
    votes: [rows, kv_heads, units] float32, units * unit >= max(kv_lengths). Per unit, exp(score - lse), the softmax
        weight, summed over the voters, the query heads of the KV head, and the unit's slots. Slots that a voter does
        not see count as 0 for it. Arbitrary for rows without voters, and beyond the units of a row's list.
    """

    voters: Tensor
    unit: int
    votes: Tensor


class _Lists:
    """Page lists of a batch, as AttentionBatch describes them."""

    __slots__ = ()
    pages: Tensor
    per_layer: bool
    prefixes: Sequence[SharedPrefix] | int
    ballot: Ballot | None
    window: int

    def __post_init__(self) -> None:
        assert not (self.per_layer and self.prefixes)
        if self.window:
            assert self.pages.dim() == 2
            assert not self.prefixes
            assert self.ballot is None

    @property
    def per_head(self) -> bool:
        """Whether there is a list per KV head."""
        return self.pages.dim() - self.per_layer == 3

    def pages_of(self, layer: LayerKV) -> Tensor:
        """Return the lists of one layer."""
        return self.pages[layer.index] if self.per_layer else self.pages


@dataclass(frozen=True, slots=True)
class AttentionBatch(_Lists):
    """KV that each row's queries read; the same for all layers of a forward, unless lists are per layer.

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
    per_layer: whether `pages` has one more dimension, the first one: [layers, …], lists of each layer (all equally
        long).
    skipped: per row, number of tokens that its list leaves out, host integers; empty: none. Only attention that
        changes the positions of keys needs it (see kernels.attention.relative).
    prefixes: rows that begin with the same pages, each row in one of them at most. Attention may read the pages of one
        once for all of its rows, and gets the same results without. None with lists per layer.
    late: whether lists of a layer may change, in place, until it runs.
    ballot: votes to count in each run; None: none.
    rows: [rows] int64, the engine's slot of each row, for attention that knows more of it than its list; None: there
        are none.
    window: largest number of slots that a query sees, the last ones of those it would see (sliding-window attention);
        0: all. Lists are as long as without a window, so that a slot's place is that of its token; pages that no query
        sees may hold anything. Only with one list per row for all layers, and without prefixes and ballot.
    """

    query_lengths: Sequence[int]
    kv_lengths: Sequence[int]
    pages: Tensor
    per_layer: bool = False
    skipped: Sequence[int] = ()
    prefixes: Sequence[SharedPrefix] = ()
    late: bool = False
    ballot: Ballot | None = None
    rows: Tensor | None = None
    window: int = 0


class PlannedAttention(Protocol):
    """Exact softmax(q k^T * scale) v over the listed pages of a batch that is planned, and over the layer's sinks. One
    plan serves all layers of a forward."""

    def run(self, layer: LayerKV, q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Attend with the planned batch.

        q: [tokens, heads, head_dim], the queries of all rows concatenated. Head h reads KV head
        h // (heads / kv_heads). Returns o [tokens, heads, head_dim] in q's dtype, and the natural log-sum-exp of the
        scaled scores, [tokens, heads] in float32 (float64 for float64 queries), by which `merge_segments` combines
        segments. Both include the layer's sinks: of segments that are merged, one has them.
        """
        ...


class AttentionBackend(PlannedAttention, Protocol):
    """Attention over batches of any shape."""

    def plan(self, batch: AttentionBatch) -> None:
        """Prepare for `batch`. The plan stays valid until the next one."""


class NoAttention:
    """Attention to the KV of layers of which a model has none."""

    def plan(self, *batch: object) -> None:
        """Plan nothing."""

    def run(self, layer: LayerKV, q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        raise AssertionError("no layer has such KV")


@dataclass(frozen=True, slots=True)
class GraphBatch(_Lists):
    """Rows of a captured forward: tensors at fixed addresses, whose values change between replays.

    A row with fewer queries is padded in front: its own queries are its last ones. So a padding query sees fewer slots
    than they do, perhaps none. Its result is arbitrary, and does not affect others.

    queries: number of queries of every row.
    pages, per_layer: as in AttentionBatch.
    lengths: [rows] int64, KV slots listed, at least 1.
    prefixes: number of prefixes that attention has room for; 0: it reads every row by itself. 0 with lists per layer.
    ballot: as in AttentionBatch. Its voters are counted back from a row's last query too, so padding never votes.
    window: as in AttentionBatch. It does not change between replays. A list may begin after slots that no query of the
        row's own sees, since the window counts back from a query.
    """

    queries: int
    pages: Tensor
    lengths: Tensor
    prefixes: int = 0
    per_layer: bool = False
    ballot: Ballot | None = None
    window: int = 0


class GraphAttention(PlannedAttention, Protocol):
    """Attention of a captured forward, over a GraphBatch. `run` is captured, with q of [rows * queries, …]."""

    def plan(self, kv_lengths: Sequence[int], prefixes: Sequence[SharedPrefix] = ()) -> None:
        """Prepare for the current values of the batch. Called before the capture and before each replay, never while
        capturing. kv_lengths: the batch's lengths, as host integers. prefixes: as in AttentionBatch, no more than the
        batch has room for; each is read once."""
