"""Attention on NVIDIA GPUs by FlashInfer (arXiv 2501.01005).

Where there is no GPU it is tested against a double of FlashInfer in torch, tests/support/fake_flashinfer.py, which says
nothing of FlashInfer's own kernels; tests/gpu compares those with the oracle.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.attention.base import AttentionBatch, GraphShape
from kernels.kv_cache import LayerKV
from kernels.transfer import send

WORKSPACE_BYTES = 128 << 20
PLAN_BYTES = 8 << 20
"""What each of FlashInfer's wrappers takes for its plans, on the device and once more of pinned memory."""
HEAD_DIMS = (64, 128, 256)
_DTYPES = (torch.float16, torch.bfloat16)
_IN_FLIGHT = 4  # plans that the host may be ahead of the device
_TENSOR_CORES = 4  # query heads per KV head from which FlashInfer's decode is faster on tensor cores

Ints = npt.NDArray[np.int64]


def load_flashinfer() -> ModuleType:
    """Raises ImportError, with what to install."""
    try:
        import flashinfer
    except ImportError as error:
        raise ImportError("attention by FlashInfer needs its package: pip install 'magicdec[cuda]'") from error
    module: ModuleType = flashinfer
    return module


def make_workspace(device: torch.device) -> Tensor:
    """Scratch memory for all backends of one device that run on one stream."""
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


@dataclass(frozen=True, slots=True)
class _Call:
    """What the queries of a forward look like; FlashInfer plans for it."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    kv_dtype: torch.dtype
    scale: float


@dataclass(slots=True)
class _Planned:
    """One of FlashInfer's wrappers, and when the device has read its last plan.

    FlashInfer writes a plan into pinned memory of the wrapper's and copies it from there without waiting, so a wrapper
    that is planned again too early spoils the plan that is on its way.
    """

    wrapper: Any
    read: torch.cuda.Event | None = None

    def plan(self, device: torch.device, *arguments: Any, **options: Any) -> None:
        if self.read is not None:
            self.read.synchronize()
        self.wrapper.plan(*arguments, **options)
        if device.type == "cuda":
            self.read = self.read or torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.read.record()


class FlashInferAttention:
    """`AttentionBackend` for float16 and bfloat16, head_dim 64, 128 or 256.

    FlashInfer has one page list for all KV heads. Where each head has its own, heads become rows: the pool is also
    [pages * kv_heads, 1, page_size, head_dim] (see LayerKV).

    FlashInfer plans for a number of heads, a scale and dtypes, which the first `run` shows; from then on `plan` has
    done all that is for the host to do, so that a captured `run` can be replayed after it. What decides a plan's shape
    is known to the host, and page ids are gathered on the device: nothing waits for it, but that the host gets no more
    than a few plans ahead, or one where plans are kept at fixed addresses.
    """

    def __init__(self, page_size: int, workspace: Tensor, fixed: GraphShape | None = None) -> None:
        """workspace: see `make_workspace`. fixed: of batches that a CUDA graph replays; others are refused, and plans
        are kept at fixed addresses. Raises ImportError where FlashInfer is missing."""
        self._library = load_flashinfer()
        self._page_size = page_size
        self._workspace = workspace
        self._device = workspace.device
        self._fixed = fixed
        self._batch: AttentionBatch | None = None
        self._call: _Call | None = None
        self._wrappers: dict[tuple[str, int], deque[_Planned]] = {}
        self._wrapper: Any = None
        self._order: Tensor | None = None
        self._kept_order: Tensor | None = None

    def plan(self, batch: AttentionBatch) -> None:
        """Raises ValueError for a batch that is not as `fixed` says."""
        if self._fixed is not None:
            self._fixed.check(batch)
        self._batch = batch
        self._wrapper = None
        if self._call is not None:
            self._prepare(batch, self._call)

    def run(self, layer: LayerKV, q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """See AttentionBackend.run. Raises ValueError for dtypes and head_dims that FlashInfer has no kernels for."""
        batch = self._batch
        assert batch is not None, "run before plan"
        tokens, heads, head_dim = q.shape
        call = _Call(heads, layer.k.shape[1], head_dim, q.dtype, layer.k.dtype, scale)
        if call != self._call or self._wrapper is None:
            _check(call)
            self._prepare(batch, call)
            self._call = call
        if batch.pages.dim() == 2:
            o, lse = self._wrapper.run(q, (layer.k, layer.v), return_lse=True)
            return o, _natural(lse)
        group = heads // call.kv_heads
        grouped = q.reshape(tokens * call.kv_heads, group, head_dim)
        if self._order is not None:
            grouped = grouped.index_select(0, self._order)
        pool = tuple(part.view(-1, 1, *part.shape[2:]) for part in (layer.k, layer.v))
        o, lse = self._wrapper.run(grouped, pool, return_lse=True)
        return self._back(o).view(tokens, heads, head_dim), _natural(self._back(lse).view(tokens, heads))

    def _back(self, results: Tensor) -> Tensor:
        """From the order in which heads are rows to that of the queries."""
        if self._order is None:
            return results
        return torch.empty_like(results).index_copy_(0, self._order, results)

    def _prepare(self, batch: AttentionBatch, call: _Call) -> None:
        queries = np.array(batch.query_lengths, dtype=np.int64)
        lengths = np.array(batch.kv_lengths, dtype=np.int64)
        pages, heads, kv_heads = batch.pages, call.heads, call.kv_heads
        self._order = None
        if pages.dim() == 3:
            pages = (pages * kv_heads + torch.arange(kv_heads, device=pages.device)[:, None]).flatten(0, 1)
            most = self._fixed.tokens if self._fixed else int(queries.sum())
            if most > len(queries):
                self._order = self._keep_order(_by_row_and_head(queries, kv_heads, most))
            queries, lengths = queries.repeat(kv_heads), lengths.repeat(kv_heads)
            heads, kv_heads = heads // kv_heads, 1
        counts = -(-lengths // self._page_size)
        ends = counts.cumsum()
        listed = np.arange(ends[-1]) + np.repeat(np.arange(len(counts)) * pages.shape[1] - (ends - counts), counts)
        indices = pages.flatten().index_select(0, self._to_device(listed)).int()
        indptr = self._host(np.concatenate([[0], ends]))
        last = self._host((lengths - 1) % self._page_size + 1)
        options = {
            "q_data_type": call.dtype,
            "kv_data_type": call.kv_dtype,
            "sm_scale": call.scale,
            "non_blocking": True,
        }
        sizes = heads, kv_heads, call.head_dim, self._page_size
        if self._fixed is None and (queries == 1).all():
            planned = self._next("decode", int(heads // kv_heads >= _TENSOR_CORES))
            planned.plan(self._device, indptr, indices, last, *sizes, **options)
        else:
            planned = self._next("prefill", len(queries) if self._fixed else 0)
            starts = self._host(np.concatenate([[0], queries.cumsum()]))
            planned.plan(self._device, starts, indptr, indices, last, *sizes, causal=True, **options)
        self._wrapper = planned.wrapper

    def _next(self, kind: Literal["decode", "prefill"], variant: int) -> _Planned:
        """The wrapper whose plan is the oldest. variant: of decode, whether on tensor cores; of prefill, to how many of
        FlashInfer's rows it is fixed, 0 for none."""
        ring = self._wrappers.setdefault((kind, variant), deque())
        if len(ring) < (1 if self._fixed else _IN_FLIGHT):
            ring.append(_Planned(self._make_decode(bool(variant)) if kind == "decode" else self._make_prefill(variant)))
        else:
            ring.rotate(-1)
        return ring[-1]

    def _make_decode(self, tensor_cores: bool) -> Any:
        make = self._library.BatchDecodeWithPagedKVCacheWrapper
        return make(self._workspace, "HND", use_tensor_cores=tensor_cores)

    def _make_prefill(self, rows: int) -> Any:
        make = self._library.BatchPrefillWithPagedKVCacheWrapper
        if self._fixed is None:
            return make(self._workspace, "HND")
        sizes = {
            "qo_indptr_buf": rows + 1,
            "paged_kv_indptr_buf": rows + 1,
            "paged_kv_indices_buf": rows * self._fixed.width,
            "paged_kv_last_page_len_buf": rows,
        }
        buffers = {name: torch.zeros(n, dtype=torch.int32, device=self._device) for name, n in sizes.items()}
        return make(self._workspace, "HND", use_cuda_graph=True, **buffers)

    def _keep_order(self, order: Ints) -> Tensor:
        moved = self._to_device(order)
        if self._fixed is None:
            return moved
        if self._kept_order is None:
            self._kept_order = moved
        return self._kept_order.copy_(moved)

    def _host(self, values: Ints) -> Tensor:
        """int32, where a copy to the device need not be waited for."""
        tensor = torch.from_numpy(values.astype(np.int32))
        return tensor.pin_memory() if self._device.type == "cuda" else tensor

    def _to_device(self, values: Ints) -> Tensor:
        return send(torch.from_numpy(values), self._device)


def merge_states(outputs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """kernels.attention.reference_attention.merge_segments by FlashInfer, for float16 and bfloat16, head_dim in
    HEAD_DIMS."""
    merge = load_flashinfer().merge_state
    merged, total = outputs[0], lses[0] / math.log(2)
    for output, lse in zip(outputs[1:], lses[1:], strict=True):
        merged, total = merge(merged, total, output, lse / math.log(2))
    return merged, _natural(total)


def _by_row_and_head(queries: Ints, kv_heads: int, tokens: int) -> Ints:
    """Which of [tokens * kv_heads], heads of a token side by side, stands where if a head's queries are side by
    side. tokens: at least the sum of `queries`; those that are nobody's stay behind them."""
    starts = queries.cumsum() - queries
    heads = np.arange(kv_heads)
    return np.concatenate(
        [
            *(
                ((start + np.arange(n)) * kv_heads + heads[:, None]).ravel()
                for start, n in zip(starts, queries, strict=True)
            ),
            np.arange(queries.sum() * kv_heads, tokens * kv_heads),
        ]
    )


def _check(call: _Call) -> None:
    if call.dtype not in _DTYPES or call.head_dim not in HEAD_DIMS:
        name = str(call.dtype).removeprefix("torch.")
        raise ValueError(
            f"FlashInfer has no kernels for {name} with head_dim {call.head_dim}: it has them for float16 and "
            f"bfloat16, and head_dim {', '.join(map(str, HEAD_DIMS))}"
        )


def _natural(lse: Tensor) -> Tensor:
    """Convert FlashInfer's log-sum-exp, which is to base 2, in place."""
    return lse.mul_(math.log(2))
