"""Parts that FlashInfer's eager and captured attention share: the library, wrappers and the memory that they hold, and
page lists in its form."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels.attention.base import AttentionBatch, GraphBatch
from kernels.flashinfer.flashinfer_sizes import Heads
from kernels.ragged import Ints

HEAD_DIMS = (64, 128, 256)
READABLE_KV = frozenset({"dense", "fp8"})
"""Formats of KV that FlashInfer reads (see kernels.kv.kv_bits)."""
_DTYPES = (torch.float16, torch.bfloat16)


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

    lists: [layers, n] int32, flat page lists of each layer; None: all layers read those of the plan. They are equally
    long, so that one plan fits all. FlashInfer takes lists in `plan` alone, so `run` exchanges the wrapper's. listed,
    indptr: see list_pages; of an eager plan.
    """

    listed: Tensor
    indptr: Tensor

    def __init__(self, wrapper: Any, device: torch.device, floats: Tensor, int_bytes: int) -> None:
        """int_bytes: size of the integers of its plans. FlashInfer allocates 8 MB for them, twice."""
        self.wrapper, self._device = wrapper, device
        self.lists: Tensor | None = None
        self._read: torch.cuda.Event | None = None
        self._take(floats, int_bytes)

    def provide(self, floats: Tensor, int_bytes: int) -> None:
        """Replace the wrapper's memory if it is less."""
        if floats is not self._floats or int_bytes > self._int_bytes:
            self._wait()
            self._take(floats, max(int_bytes, self._int_bytes))

    def plan(self, *arguments: Any, **options: Any) -> None:
        self._wait()
        if self.lists is not None:
            self.wrapper._paged_kv_indices_buf = self.lists[0]  # a captured plan writes into the wrapper's
        self.wrapper.plan(*arguments, **options)
        if self._device.type == "cuda":
            self._read = self._read or torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._read.record()

    def list_again(self, layer: int, pages: Tensor) -> None:
        """Replace the list of a layer, or the one of all layers. pages: [rows, width], with lists as long."""
        list_pages(pages, self.indptr, self.listed if self.lists is None else self.listed[layer])

    def run(self, q: Tensor, pool: tuple[Tensor, ...], out: Tensor, lse: Tensor, layer: int = 0) -> None:
        """Write a layer's attention to `out`, and its log-sum-exp to base 2 to `lse`."""
        if self.lists is not None:
            self.wrapper._paged_kv_indices_buf = self.lists[layer]
        self.wrapper.run(q, pool, out=out, lse=lse, return_lse=True)

    def _take(self, floats: Tensor, int_bytes: int) -> None:
        self._floats, self._int_bytes = floats, int_bytes
        self.wrapper.reset_workspace_buffer(floats, torch.empty(int_bytes, dtype=torch.uint8, device=self._device))

    def _wait(self) -> None:
        if self._read is not None:
            self._read.synchronize()


# -- page lists ------------------------------------------------------------------------------------------------------


def flat_pages(batch: AttentionBatch | GraphBatch, pages: Tensor) -> Tensor:
    """Return a batch's page lists as FlashInfer's rows see them, [rows, width], or [layers, rows, width].

    pages: the batch's own, or others of the same form. With lists per KV head, each head becomes a row, over the pool
    seen as [pages * heads, 1, …].
    """
    if not batch.per_head:
        return pages
    heads = pages.shape[-2]
    return (pages * heads + torch.arange(heads, device=pages.device)[:, None]).flatten(-3, -2)


def list_pages(pages: Tensor, indptr: Tensor, listed: Tensor) -> None:
    """Write FlashInfer's ragged list of pages, by operations whose shapes do not depend on lengths.

    pages: [rows, width]. indptr: [rows + 1] int32, offsets of rows in the list. listed: int32, at least one longer than
    the list; its last element is overwritten with any page. Or `pages` and `listed` have [layers] in front.
    """
    place = indptr[:-1, None] + torch.arange(pages.shape[-1], device=pages.device)
    place = torch.where(place < indptr[1:, None], place, listed.shape[-1] - 1)
    listed.scatter_(-1, place.flatten().expand(*listed.shape[:-1], -1), pages.flatten(-2).to(torch.int32))


# -- small things ----------------------------------------------------------------------------------------------------


def to_pinned(values: Ints, device: torch.device) -> Tensor:
    """Convert to int32, in pinned memory for a GPU, so that copies to it need no wait."""
    tensor = torch.from_numpy(values.astype(np.int32))
    return tensor.pin_memory() if device.type == "cuda" else tensor


def to_natural_log(lse: Tensor) -> Tensor:
    """Convert FlashInfer's base-2 log-sum-exp to the natural one, in place."""
    return lse.mul_(math.log(2))
