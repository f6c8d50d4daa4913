"""Parts that FlashInfer's eager and captured attention share: scratch memory, its size, and the wrappers that hold it.

FlashInfer's planners size memory in C++ while they plan. The formulas here are upper bounds of what all versions from
0.6.6 to 0.7.2 ask for (include/flashinfer/attention/scheduler.cuh: PrefillPlan, PrefillSM90Plan), so that memory is
allocated once, before anything is captured.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

HEAD_DIMS = (64, 128, 256)
_DTYPES = (torch.float16, torch.bfloat16)
_NEW_INTS_BYTES = 8 << 20  # a new wrapper has these until they are replaced, and torch keeps them for the next one
_LENGTHS_BYTES = 128 << 10  # of a prefill wrapper, for other backends than ours
_FA3_TILE = 128  # queries of one head in a tile of FA3; 192 for head_dim 64

Ints = npt.NDArray[np.int64]
Kernels = Literal["fa2", "fa3"]


def load_flashinfer() -> ModuleType:
    """Import FlashInfer. Raises ImportError with an installation hint."""
    try:
        import flashinfer
    except ImportError as error:
        raise ImportError("attention by FlashInfer needs its package: pip install 'magicdec[cuda]'") from error
    module: ModuleType = flashinfer
    return module


@cache
def takes_uniform_queries(library: ModuleType) -> bool:
    """Whether FlashInfer can be told that all rows of a captured batch have the same number of queries.

    Its decode wrapper can, from 0.6.18 on; it then runs the FA2 kernels of the prefill wrapper, in tiles of that
    number. `plan` does not name its arguments in all versions; `workspace_size`, which has the same, does.
    """
    size = getattr(library.BatchDecodeWithPagedKVCacheWrapper, "workspace_size", None)
    return size is not None and "q_len_per_req" in inspect.signature(size).parameters


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


@dataclass(frozen=True, slots=True)
class Call:
    """Parameters of a forward's attention that FlashInfer plans for."""

    heads: Heads
    dtype: torch.dtype
    kv_dtype: torch.dtype
    scale: float

    def check(self) -> None:
        """Raise ValueError for dtypes and head_dims without FlashInfer kernels."""
        if self.dtype not in _DTYPES or self.heads.head_dim not in HEAD_DIMS:
            name = str(self.dtype).removeprefix("torch.")
            raise ValueError(
                f"FlashInfer has no kernels for {name} with head_dim {self.heads.head_dim}: it has them for float16 "
                f"and bfloat16, and head_dim {', '.join(map(str, HEAD_DIMS))}"
            )

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of every plan."""
        kinds = {"q_data_type": self.dtype, "kv_data_type": self.kv_dtype}
        return {**kinds, "sm_scale": self.scale, "non_blocking": True}


# -- sizes -----------------------------------------------------------------------------------------------------------


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
    tokens = rows * queries
    if uniform and queries > 1:
        tile = tile_rows(queries * heads.group, heads.head_dim)
        tiles = rows * _ceil(queries * heads.group, tile)
    else:
        tile = tile_rows((tokens - rows + 1) * heads.group, heads.head_dim)
        tiles = _ceil(tokens * heads.group, tile) + rows - 1
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
    heads: Heads, rows: list[int], queries: list[int], width: int, multiprocessors: int, uniform: bool
) -> tuple[int, int]:
    """Bound the device memory of captured attention: scratch memory, which all share, and the sum of their own.

    rows, queries: the numbers of rows and of queries per row that are captured, each with each. width: largest number
    of pages in a list, which serves all KV heads. uniform: see takes_uniform_queries.
    """
    floats, own = eager_float_bytes(heads, multiprocessors), 0
    for count in rows:
        for each in queries:
            plan = captured_plan(heads, count, each, multiprocessors, uniform)
            floats = max(floats, plan.floats)
            own += plan.ints + count * (12 * width + 24) + (0 if uniform else _LENGTHS_BYTES)
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


# -- memory ----------------------------------------------------------------------------------------------------------


class Workspace:
    """Scratch memory of one device, shared by all wrappers that run on one stream.

    It grows to the largest size asked for. A wrapper keeps the memory that it has until it asks again, which a captured
    one never does: graphs hold its address.

    capability, multiprocessors: the device's.
    """

    def __init__(self, device: torch.device, capability: tuple[int, int], multiprocessors: int) -> None:
        self.device, self.capability, self.multiprocessors = device, capability, multiprocessors
        self._floats = torch.zeros(0, dtype=torch.uint8, device=device)

    def take(self, nbytes: int) -> Tensor:
        """Return memory of at least `nbytes`."""
        if len(self._floats) < nbytes:
            self._floats = torch.zeros(nbytes, dtype=torch.uint8, device=self.device)
        return self._floats


def make_workspace(device: torch.device) -> Workspace:
    """Make the scratch memory of a GPU. It is empty until attention is planned."""
    found = torch.cuda.get_device_properties(device)
    return Workspace(device, (found.major, found.minor), found.multi_processor_count)


class Planned:
    """A FlashInfer wrapper with memory for its plan.

    FlashInfer writes a plan into the wrapper's pinned memory and copies it from there without waiting. Planning the
    wrapper again before that copy ends would corrupt the earlier plan, so `plan` waits for it.
    """

    def __init__(self, wrapper: Any, device: torch.device, floats: Tensor, int_bytes: int) -> None:
        """int_bytes: size of the integers of its plans. FlashInfer allocates 8 MB for them, twice."""
        self.wrapper, self._device = wrapper, device
        self._read: torch.cuda.Event | None = None
        self._take(floats, int_bytes)

    def provide(self, floats: Tensor, int_bytes: int) -> None:
        """Replace the wrapper's memory if it is less."""
        if floats is not self._floats or int_bytes > self._int_bytes:
            self._wait()
            self._take(floats, max(int_bytes, self._int_bytes))

    def plan(self, *arguments: Any, **options: Any) -> None:
        self._wait()
        self.wrapper.plan(*arguments, **options)
        if self._device.type == "cuda":
            self._read = self._read or torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._read.record()

    def _take(self, floats: Tensor, int_bytes: int) -> None:
        self._floats, self._int_bytes = floats, int_bytes
        self.wrapper.reset_workspace_buffer(floats, torch.empty(int_bytes, dtype=torch.uint8, device=self._device))

    def _wait(self) -> None:
        if self._read is not None:
            self._read.synchronize()


# -- page lists ------------------------------------------------------------------------------------------------------


def flat_pages(pages: Tensor) -> Tensor:
    """Return page lists as FlashInfer's rows see them, [rows, width].

    pages: [rows, width], or [rows, heads, width] where each head becomes a row, over the pool seen as
    [pages * heads, 1, …].
    """
    if pages.dim() == 2:
        return pages
    heads = pages.shape[1]
    return (pages * heads + torch.arange(heads, device=pages.device)[:, None]).flatten(0, 1)


def list_pages(pages: Tensor, indptr: Tensor, listed: Tensor) -> None:
    """Write FlashInfer's ragged list of pages, by operations whose shapes do not depend on lengths.

    pages: [rows, width]. indptr: [rows + 1] int32, offsets of rows in the list. listed: int32, at least one longer than
    the list; its last element is overwritten with any page.
    """
    place = indptr[:-1, None] + torch.arange(pages.shape[1], device=pages.device)
    place = torch.where(place < indptr[1:, None], place, len(listed) - 1)
    listed.scatter_(0, place.flatten(), pages.flatten().to(torch.int32))


# -- small things ----------------------------------------------------------------------------------------------------


def to_pinned(values: Ints, device: torch.device) -> Tensor:
    """Convert to int32, in pinned memory for a GPU, so that copies to it need no wait."""
    tensor = torch.from_numpy(values.astype(np.int32))
    return tensor.pin_memory() if device.type == "cuda" else tensor


def offsets(counts: Ints) -> Ints:
    """Return the offset of each row, and the total."""
    return np.concatenate([np.zeros(1, dtype=np.int64), counts.cumsum()])


def ragged_arange(counts: Ints) -> Ints:
    """Concatenate 0 … count - 1 of each count."""
    return np.arange(int(counts.sum())) - np.repeat(counts.cumsum() - counts, counts)


def to_natural_log(lse: Tensor) -> Tensor:
    """Convert FlashInfer's base-2 log-sum-exp to the natural one, in place."""
    return lse.mul_(math.log(2))
