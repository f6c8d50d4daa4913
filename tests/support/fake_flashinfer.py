"""A fake of FlashInfer 0.7 in torch, with the names that `kernels.flashinfer` uses.

It refuses what the real library refuses, and arguments that would make it wait for the device or read beyond its
buffers. It tests the calls that attention makes; tests/unit/kernels/test_flashinfer_versions.py has FlashInfer's own.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__version__ = "0.7"


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    indptr: Tensor,
    indices: Tensor,
    last: Tensor,
    sm_scale: float,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """Compute attention, causal and aligned at the bottom right, or without a mask. k, v: [pages, kv_heads, page_size,
    head_dim]. The log-sum-exp is to base 2. A query that sees nothing gets NaN, as it may from FlashInfer."""
    group = q.shape[1] // k.shape[1]
    out, lse = torch.full_like(q, math.nan), torch.full(q.shape[:2], math.nan, dtype=torch.float32)
    for row in range(len(last)):
        first, end = int(starts[row]), int(starts[row + 1])
        pages = indices[int(indptr[row]) : int(indptr[row + 1])].long()
        length = (len(pages) - 1) * k.shape[2] + int(last[row])
        keys, values = (
            part[pages].transpose(0, 1).flatten(1, 2)[:, :length].float().repeat_interleave(group, 0) for part in (k, v)
        )
        n = end - first
        scores = torch.einsum("nhd,hld->hnl", q[first:end].float(), keys) * sm_scale
        seen = torch.arange(length - n, length)[:, None]
        if causal:
            scores.masked_fill_(torch.arange(length) > seen, float("-inf"))
        out[first:end] = torch.einsum("hnl,hld->nhd", scores.softmax(-1), values).to(q.dtype)
        lse[first:end] = scores.logsumexp(-1).T / math.log(2)
    return out, lse


def _refuse(refused: bool, reason: str) -> None:
    if refused:
        raise ValueError(reason)


class FakeWrapper:
    """Both wrappers. _buffers: offsets of lists, lists and lengths of last pages, at fixed addresses; none: eager."""

    def __init__(self, workspace: Tensor, kv_layout: str, buffers: list[Tensor], backend: str) -> None:
        assert kv_layout == "HND"
        assert workspace.dtype == torch.uint8
        self.backend, self._buffers = backend, buffers
        self._floats, self._ints = workspace, torch.empty(8 << 20, dtype=torch.uint8)
        self._planned: tuple[Any, ...] = ()
        self._paged_kv_indices_buf: Tensor | None = None  # read by each run, as FlashInfer's is
        if buffers:
            assert len(buffers[0]) == len(buffers[2]) + 1
            self._paged_kv_indices_buf = buffers[1]

    def reset_workspace_buffer(self, float_workspace_buffer: Tensor, int_workspace_buffer: Tensor) -> None:
        assert float_workspace_buffer.dtype == int_workspace_buffer.dtype == torch.uint8
        self._floats, self._ints = float_workspace_buffer, int_workspace_buffer

    def _keep(
        self,
        starts: Tensor,
        indptr: Tensor,
        indices: Tensor,
        last: Tensor,
        sizes: tuple[int, int, int, int],
        dtypes: tuple[torch.dtype, torch.dtype | None],
        sm_scale: float | None,
        causal: bool = True,
    ) -> None:
        page_size = sizes[3]
        for host in (starts, indptr, last):
            assert (host.device.type, host.dtype) == ("cpu", torch.int32)  # on the device, plan would synchronize
        assert indices.dtype == torch.int32
        assert len(starts) == len(indptr) == len(last) + 1
        assert len(indices) == int(indptr[-1])
        assert bool(((last >= 1) & (last <= page_size)).all())
        assert sm_scale is not None
        assert dtypes[1] is not None
        if self._buffers:
            _refuse(len(last) != len(self._buffers[2]), "the batch size should be fixed in cuda graph mode")
            own = self._paged_kv_indices_buf
            assert own is not None
            assert own.data_ptr() == indices.data_ptr()  # or else there would be a copy
            _refuse(len(indices) > len(own), "paged_kv_indices exceeds the allocated buffer size")
            kept = self._buffers[0], self._buffers[2]
            for buffer, new in zip(kept, (indptr, last), strict=True):
                buffer.copy_(new)
            indptr, last = kept
        else:
            self._paged_kv_indices_buf = indices
        self._planned = starts, indptr, last, sizes, dtypes, sm_scale, causal

    def run(
        self,
        q: Tensor,
        paged_kv_cache: tuple[Tensor, Tensor],
        *args: Any,
        q_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
        window_left: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        k, v = paged_kv_cache
        starts, indptr, last, sizes, dtypes, sm_scale, causal = self._planned
        indices = self._paged_kv_indices_buf
        assert indices is not None
        _refuse(q.shape[0] != int(starts[-1]), "q.shape[0] does not match qo_indptr[-1]")
        _refuse((q.dtype, k.dtype) != dtypes, "the dtypes are not those of plan")
        assert (q.shape[1], k.shape[1], q.shape[2], k.shape[2]) == sizes
        found = attend(q, k, v, starts, indptr, indices, last, sm_scale, causal)
        assert out is not None  # the prefill wrapper would fill one with zeros
        assert lse is not None
        for given, result in ((out, found[0]), (lse, found[1])):
            _refuse((given.shape, given.dtype) != (result.shape, result.dtype), "shape or dtype of out or lse")
            assert given.is_contiguous()
            given.copy_(result)
        return (out, lse) if return_lse else out


class BatchPrefillWithPagedKVCacheWrapper(FakeWrapper):
    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: Tensor | None = None,
        paged_kv_indptr_buf: Tensor | None = None,
        paged_kv_indices_buf: Tensor | None = None,
        paged_kv_last_page_len_buf: Tensor | None = None,
        custom_mask_buf: Tensor | None = None,
        mask_indptr_buf: Tensor | None = None,
        backend: str = "auto",
    ) -> None:
        given = (paged_kv_indptr_buf, paged_kv_indices_buf, paged_kv_last_page_len_buf)
        buffers = [buffer for buffer in given if use_cuda_graph and buffer is not None]
        super().__init__(float_workspace_buffer, kv_layout, buffers, backend)
        assert not use_cuda_graph or (qo_indptr_buf is not None and len(buffers) == 3)
        self._max_total_num_rows: int | None = None

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        head_dim_vo: int | None = None,
        custom_mask: Tensor | None = None,
        packed_custom_mask: Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
        o_data_type: torch.dtype | None = None,
        non_blocking: bool = True,
        *,
        seq_lens: Tensor | None = None,
    ) -> None:
        if self._buffers:
            total = int(qo_indptr[-1])
            self._max_total_num_rows = self._max_total_num_rows or total
            _refuse(total > self._max_total_num_rows, "the total number of rows exceeds the first one")
        sizes = num_qo_heads, num_kv_heads, head_dim_qk, page_size
        lists = paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len
        self._keep(qo_indptr, *lists, sizes, (q_data_type, kv_data_type), sm_scale, causal)


class BatchDecodeWithPagedKVCacheWrapper(FakeWrapper):
    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: Tensor | None = None,
        paged_kv_indices_buffer: Tensor | None = None,
        paged_kv_last_page_len_buffer: Tensor | None = None,
        backend: str = "auto",
    ) -> None:
        given = (paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer)
        super().__init__(float_workspace_buffer, kv_layout, [buffer for buffer in given if buffer is not None], backend)
        assert use_cuda_graph
        assert use_tensor_cores  # the others are compiled apart
        assert len(self._buffers) == 3
        self._q_len_per_req: int | None = None

    def workspace_size(self, *args: Any, q_len_per_req: int = 1, **kwargs: Any) -> tuple[int, int]:
        raise NotImplementedError

    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        window_right: int = 0,
        logits_soft_cap: float | None = None,
        q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
        o_data_type: torch.dtype | None = None,
        data_type: torch.dtype | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        non_blocking: bool = True,
        *,
        seq_lens: Tensor | None = None,
        q_len_per_req: int = 1,
    ) -> None:
        lengths = (indptr[1:] - indptr[:-1] - 1) * page_size + last_page_len if seq_lens is None else seq_lens
        _refuse(self._q_len_per_req not in (None, q_len_per_req), "q_len_per_req is part of the frozen shape")
        _refuse(q_len_per_req > 1 and bool((lengths < q_len_per_req).any()), "kv_len >= q_len_per_req is required")
        self._q_len_per_req = q_len_per_req
        starts = torch.arange(len(indptr), dtype=torch.int32) * q_len_per_req
        sizes = num_qo_heads, num_kv_heads, head_dim, page_size
        self._keep(starts, indptr, indices, last_page_len, sizes, (q_data_type, kv_data_type), sm_scale)
