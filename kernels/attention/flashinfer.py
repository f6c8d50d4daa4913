"""Attention on NVIDIA GPUs by FlashInfer (arXiv 2501.01005).

Without a GPU, tests run it against a torch stand-in for FlashInfer, tests/support/fake_flashinfer.py, which does not
cover FlashInfer's own kernels; tests/gpu compares those with the oracle.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.attention.base import AttentionBatch, GraphBatch
from kernels.kv_cache import LayerKV
from kernels.transfer import send

WORKSPACE_BYTES = 128 << 20
PLAN_BYTES = 8 << 20
"""Memory of one FlashInfer wrapper for its plans: this much on the device, and as much pinned."""
HEAD_DIMS = (64, 128, 256)
_DTYPES = (torch.float16, torch.bfloat16)
_IN_FLIGHT = 4  # largest number of plans by which the host is ahead of the device
_TENSOR_CORES = 4  # query heads per KV head at which FlashInfer's decode becomes faster on tensor cores

Ints = npt.NDArray[np.int64]


def load_flashinfer() -> ModuleType:
    """Import FlashInfer. Raises ImportError with an installation hint."""
    try:
        import flashinfer
    except ImportError as error:
        raise ImportError("attention by FlashInfer needs its package: pip install 'magicdec[cuda]'") from error
    module: ModuleType = flashinfer
    return module


def make_workspace(device: torch.device) -> Tensor:
    """Allocate scratch memory, shared by all backends of one device that run on one stream."""
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


@dataclass(frozen=True, slots=True)
class GraphShape:
    rows: int
    tokens: int
    width: int

    def check(self, batch: AttentionBatch) -> None:
        return None


@dataclass(frozen=True, slots=True)
class _Call:
    """Parameters of a forward's attention that FlashInfer plans for."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    kv_dtype: torch.dtype
    scale: float


@dataclass(slots=True)
class _Wrapper:
    """A FlashInfer wrapper. read: event after which the device has read its last plan.

    FlashInfer writes a plan into the wrapper's pinned memory and copies it from there without waiting. Planning the
    wrapper again before that copy ends would corrupt the earlier plan.
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

    FlashInfer takes one page list for all KV heads. If each head has its own, heads become rows: the pool is also
    [pages * kv_heads, 1, page_size, head_dim] (see LayerKV).

    FlashInfer plans for a number of heads, a scale and dtypes, which the first `run` supplies. From then on `plan` does
    all of the host's work, so that a captured `run` can be replayed after it. A plan's shape follows from host data,
    and page ids are gathered on the device. So the host does not wait for the device, except to stay at most a few
    plans ahead, or one if plans are kept at fixed addresses.
    """

    def __init__(self, page_size: int, workspace: Tensor, graph_shape: GraphShape | None = None) -> None:
        """workspace: see `make_workspace`. fixed: shape of batches that a CUDA graph replays; other batches are
        refused, and plans are kept at fixed addresses. Raises ImportError if FlashInfer is missing."""
        self._library = load_flashinfer()
        self._page_size = page_size
        self._workspace = workspace
        self._device = workspace.device
        self._graph_shape = graph_shape
        self._batch: AttentionBatch | None = None
        self._call: _Call | None = None
        self._wrappers: dict[tuple[str, int], deque[_Wrapper]] = {}
        self._wrapper: Any = None
        self._order: Tensor | None = None
        self._order_buffer: Tensor | None = None

    def plan(self, batch: AttentionBatch) -> None:
        """Plan for `batch`. Raises ValueError if it does not fit `fixed`."""
        if self._graph_shape is not None:
            self._graph_shape.check(batch)
        self._batch = batch
        self._wrapper = None
        if self._call is not None:
            self._prepare(batch, self._call)

    def run(self, layer: LayerKV, q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """See AttentionBackend.run. Raises ValueError for dtypes and head_dims without FlashInfer kernels."""
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
            return o, _to_natural_log(lse)
        group = heads // call.kv_heads
        grouped = q.reshape(tokens * call.kv_heads, group, head_dim)
        if self._order is not None:
            grouped = grouped.index_select(0, self._order)
        pool = tuple(part.view(-1, 1, *part.shape[2:]) for part in (layer.k, layer.v))
        o, lse = self._wrapper.run(grouped, pool, return_lse=True)
        return self._restore_query_order(o).view(tokens, heads, head_dim), _to_natural_log(
            self._restore_query_order(lse).view(tokens, heads)
        )

    def _restore_query_order(self, results: Tensor) -> Tensor:
        """Reorder results from the order in which heads are rows to that of the queries."""
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
            num_queries = self._graph_shape.tokens if self._graph_shape else int(queries.sum())
            if num_queries > len(queries):
                self._order = self._store_order(_head_major_order(queries, kv_heads, num_queries))
            queries, lengths = queries.repeat(kv_heads), lengths.repeat(kv_heads)
            heads, kv_heads = heads // kv_heads, 1
        counts = -(-lengths // self._page_size)
        ends = counts.cumsum()
        listed = np.arange(ends[-1]) + np.repeat(np.arange(len(counts)) * pages.shape[1] - (ends - counts), counts)
        indices = pages.flatten().index_select(0, self._to_device(listed)).int()
        indptr = self._to_pinned(np.concatenate([[0], ends]))
        last = self._to_pinned((lengths - 1) % self._page_size + 1)
        options = {
            "q_data_type": call.dtype,
            "kv_data_type": call.kv_dtype,
            "sm_scale": call.scale,
            "non_blocking": True,
        }
        sizes = heads, kv_heads, call.head_dim, self._page_size
        if self._graph_shape is None and (queries == 1).all():
            planned = self._next_wrapper("decode", int(heads // kv_heads >= _TENSOR_CORES))
            planned.plan(self._device, indptr, indices, last, *sizes, **options)
        else:
            planned = self._next_wrapper("prefill", len(queries) if self._graph_shape else 0)
            starts = self._to_pinned(np.concatenate([[0], queries.cumsum()]))
            planned.plan(self._device, starts, indptr, indices, last, *sizes, causal=True, **options)
        self._wrapper = planned.wrapper

    def _next_wrapper(self, kind: Literal["decode", "prefill"], variant: int) -> _Wrapper:
        """Return a new wrapper, or, if there are enough, the one with the oldest plan.

        variant: for decode, whether it uses tensor cores; for prefill, the number of FlashInfer's rows that it is fixed
        to, 0 if it is not.
        """
        ring = self._wrappers.setdefault((kind, variant), deque())
        if len(ring) < (1 if self._graph_shape else _IN_FLIGHT):
            ring.append(_Wrapper(self._make_decode(bool(variant)) if kind == "decode" else self._make_prefill(variant)))
        else:
            ring.rotate(-1)
        return ring[-1]

    def _make_decode(self, tensor_cores: bool) -> Any:
        make = self._library.BatchDecodeWithPagedKVCacheWrapper
        return make(self._workspace, "HND", use_tensor_cores=tensor_cores)

    def _make_prefill(self, rows: int) -> Any:
        make = self._library.BatchPrefillWithPagedKVCacheWrapper
        if self._graph_shape is None:
            return make(self._workspace, "HND")
        sizes = {
            "qo_indptr_buf": rows + 1,
            "paged_kv_indptr_buf": rows + 1,
            "paged_kv_indices_buf": rows * self._graph_shape.width,
            "paged_kv_last_page_len_buf": rows,
        }
        buffers = {name: torch.zeros(n, dtype=torch.int32, device=self._device) for name, n in sizes.items()}
        return make(self._workspace, "HND", use_cuda_graph=True, **buffers)

    def _store_order(self, order: Ints) -> Tensor:
        moved = self._to_device(order)
        if self._graph_shape is None:
            return moved
        if self._order_buffer is None:
            self._order_buffer = moved
        return self._order_buffer.copy_(moved)

    def _to_pinned(self, values: Ints) -> Tensor:
        """Convert to int32, in pinned memory for a GPU, so that copies to it need no wait."""
        tensor = torch.from_numpy(values.astype(np.int32))
        return tensor.pin_memory() if self._device.type == "cuda" else tensor

    def _to_device(self, values: Ints) -> Tensor:
        return send(torch.from_numpy(values), self._device)


class FlashInferGraphAttention:
    def __init__(self, page_size: int, workspace: Tensor, batch: GraphBatch) -> None:
        rows = len(batch.lengths)
        shape = GraphShape(rows, rows * batch.queries, batch.pages.shape[-1])
        self._batch, self._inner = batch, FlashInferAttention(page_size, workspace, shape)

    def plan(self, kv_lengths: Sequence[int]) -> None:
        queries = [self._batch.queries] * len(kv_lengths)
        self._inner.plan(AttentionBatch(queries, kv_lengths, self._batch.pages))

    def run(self, layer: LayerKV, q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return self._inner.run(layer, q, scale)


def merge_states(outputs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Compute kernels.attention.reference_attention.merge_segments by FlashInfer, for float16 and bfloat16, and
    head_dim in HEAD_DIMS."""
    merge = load_flashinfer().merge_state
    merged, total = outputs[0], lses[0] / math.log(2)
    for output, lse in zip(outputs[1:], lses[1:], strict=True):
        merged, total = merge(merged, total, output, lse / math.log(2))
    return merged, _to_natural_log(total)


def _head_major_order(queries: Ints, kv_heads: int, tokens: int) -> Ints:
    """Return the order that makes each row's queries of one head adjacent: indices into [tokens * kv_heads], in which
    the heads of one token are adjacent. tokens: at least the sum of `queries`; surplus ones are padding and stay at the
    end."""
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


def _to_natural_log(lse: Tensor) -> Tensor:
    """Convert FlashInfer's base-2 log-sum-exp to the natural one, in place."""
    return lse.mul_(math.log(2))
