"""Sizes of the memory that FlashInfer's planners ask for.

They work it out in C++ while they plan. The formulas here are upper bounds for all versions from 0.6.6 to 0.7.2
(include/flashinfer/attention/scheduler.cuh: PrefillPlan, PrefillSM90Plan), so that memory is allocated once, before
anything is captured. Tests compare them with the planners themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from kernels.ragged import Ints

_NEW_INTS_BYTES = 8 << 20  # a new wrapper has these until they are replaced, and torch keeps them for the next one
_LENGTHS_BYTES = 128 << 10  # of a prefill wrapper, for other backends than ours
_FA3_TILE = 128  # queries of one head in a tile of FA3; 192 for head_dim 64

Kernels = Literal["fa2", "fa3"]


class Heads(NamedTuple):
    """Query heads, KV heads and their size, as FlashInfer is given them."""

    heads: int
    kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    def as_rows(self) -> Heads:
        """Return the heads of one row where each KV head of a row is a row of its own."""
        return Heads(self.group, 1, self.head_dim)


class PlanBytes(NamedTuple):
    """Bytes that a plan takes. floats: partial results, shared by all wrappers. ints: of one wrapper, on the device
    and as much in pinned memory."""

    floats: int
    ints: int


def tile_rows(packed: int, head_dim: int) -> int:
    """Return the rows of FA2's tiles (FA2DetermineCtaTileQ, from sm_80 on). packed: queries times heads per KV head,
    which FA2 packs into one dimension."""
    if packed > 64 and head_dim < 256:
        return 128
    return 64 if packed > 16 else 16


def captured_plan(heads: Heads, rows: int, queries: int, multiprocessors: int, uniform: bool) -> PlanBytes:
    """Bound the memory of a captured batch, which does not depend on lengths. uniform: see takes_uniform_queries.

    A captured plan always splits KV. Without the hint, the planner assumes that one row may have all queries but one
    of each other row, and rounds each row up to a tile.
    """
    if not uniform or queries == 1:
        return captured_ragged_plan(heads, rows, rows * queries, multiprocessors)
    tile = tile_rows(queries * heads.group, heads.head_dim)
    tiles = rows * _ceil(queries * heads.group, tile)
    return _captured(heads, rows, rows * queries, tile, tiles, multiprocessors)


def captured_ragged_plan(heads: Heads, rows: int, tokens: int, multiprocessors: int) -> PlanBytes:
    """Bound the memory of a captured batch whose rows may have any numbers of queries, none included. tokens: their
    sum."""
    tile = tile_rows((tokens - rows + 1) * heads.group, heads.head_dim)
    return _captured(heads, rows, tokens, tile, _ceil(tokens * heads.group, tile) + rows - 1, multiprocessors)


def _captured(heads: Heads, rows: int, tokens: int, tile: int, tiles: int, multiprocessors: int) -> PlanBytes:
    blocks = max(_blocks(heads, multiprocessors), tiles)
    return PlanBytes(_partial_bytes(heads, blocks, tile), _fa2_ints(rows, tokens, blocks))


def eager_float_bytes(heads: Heads, multiprocessors: int) -> int:
    """Bound the partial results of any batch that is not captured: FA2 splits KV only where that gives no more blocks
    than the device runs at once, and FA3 does not."""
    return _partial_bytes(heads, _blocks(heads, multiprocessors), tile_rows(1 << 30, heads.head_dim))


def eager_int_bytes(kernels: Kernels, heads: Heads, queries: Ints, multiprocessors: int) -> int:
    """Bound the integers of a batch that is not captured. queries: of each row."""
    rows, tokens = len(queries), int(queries.sum())
    if kernels == "fa3":
        works = heads.heads * int(_ceil(queries, _FA3_TILE).sum())
        return 7 * _align(4 * works) + _align(4 * (multiprocessors + 1))
    tile = tile_rows(tokens * heads.group // rows, heads.head_dim)
    tiles = int(_ceil(queries * heads.group, tile).sum())
    return _fa2_ints(rows, tokens, max(_blocks(heads, multiprocessors), tiles))


def captured_memory(
    heads: Heads,
    rows: list[int],
    queries: list[int],
    width: int,
    multiprocessors: int,
    uniform: bool,
    prefixes: Callable[[int], int] | None = None,
) -> tuple[int, int]:
    """Bound the device memory of captured attention: scratch memory, which all share, and the sum of their own.

    rows, queries: the numbers of rows and of queries per row that are captured, each with each. width: largest number
    of pages in a list, which serves all KV heads; where each layer has its own, in those of all layers. uniform: see
    takes_uniform_queries. prefixes: room for prefixes, by number of rows, of second captures that read shared pages
    once; None: there are none.
    """
    floats, own = eager_float_bytes(heads, multiprocessors), 0
    for count in rows:
        for each in queries:
            plan = captured_plan(heads, count, each, multiprocessors, uniform)
            floats = max(floats, plan.floats)
            one = plan.ints + count * (12 * width + 24) + (0 if uniform else _LENGTHS_BYTES)
            own += one
            if prefixes is not None and count > 1:
                more = prefixes(count) + 1
                plan = captured_ragged_plan(heads, more, count * each, multiprocessors)
                floats = max(floats, plan.floats)
                own += one + plan.ints + more * (4 * width + 24) + 16 * count * each + _LENGTHS_BYTES
    return floats + _NEW_INTS_BYTES, own


def _blocks(heads: Heads, multiprocessors: int) -> int:
    """Return the number of (tile, part of KV) pairs up to which FA2 splits KV: two blocks per multiprocessor."""
    return 2 * multiprocessors // heads.kv_heads


def _partial_bytes(heads: Heads, blocks: int, tile: int) -> int:
    """Sum float32 outputs and log-sum-exps of all parts. 0.7.2 needs 1 / group of it, earlier versions all."""
    rows = heads.heads * blocks * tile
    return _align(4 * rows * heads.head_dim) + _align(4 * rows)


def _fa2_ints(rows: int, tokens: int, blocks: int) -> int:
    """Sum the arrays of a plan: three indices and a flag per block, offsets of rows and of queries, two scalars."""
    return 3 * _align(4 * blocks) + _align(blocks) + _align(4 * (rows + 1)) + _align(4 * (tokens + 1)) + 2 * _align(4)


def _ceil(a: Any, b: int) -> Any:
    return -(-a // b)


def _align(count: int) -> int:
    """Round up to FlashInfer's alignment of arrays."""
    return -(-count // 16) * 16
