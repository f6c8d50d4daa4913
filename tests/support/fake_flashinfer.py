"""A fake of FlashInfer 0.6 and 0.7 in torch, with the names that `kernels.attention.flashinfer` uses.

Signatures and semantics follow FlashInfer's documentation. The fake rejects arguments that would make the real library
wait for the device or read beyond its buffers. It tests the calls that the backend makes, not FlashInfer itself.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def _attend(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, indptr: Tensor, indices: Tensor, last: Tensor, sm_scale: float
) -> tuple[Tensor, Tensor]:
    """Compute attention, causal and aligned at the bottom right. k, v: [pages, kv_heads, page_size, head_dim]. The
    log-sum-exp is to base 2."""
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
        scores.masked_fill_(torch.arange(length) > seen, float("-inf"))
        out[first:end] = torch.einsum("hnl,hld->nhd", scores.softmax(-1), values).to(q.dtype)
        lse[first:end] = scores.logsumexp(-1).T / math.log(2)
    return out, lse


def merge_state(v_a: Tensor, s_a: Tensor, v_b: Tensor, s_b: Tensor) -> tuple[Tensor, Tensor]:
    """Merge the attention of two segments. s_a, s_b: log-sum-exps to base 2, [tokens, heads] float32."""
    assert v_a.dtype == v_b.dtype
    assert s_a.dtype == s_b.dtype == torch.float32
    total = torch.logaddexp2(s_a, s_b)
    parts = (v.float() * torch.exp2(s - total)[..., None] for v, s in ((v_a, s_a), (v_b, s_b)))
    return sum(parts, torch.zeros(())).to(v_a.dtype), total


class _Wrapper:
    def __init__(self, workspace: Tensor, kv_layout: str) -> None:
        assert kv_layout == "HND"
        assert workspace.dtype == torch.uint8
        self._planned: tuple[Any, ...] = ()

    def _keep(
        self,
        starts: Tensor,
        indptr: Tensor,
        indices: Tensor,
        last: Tensor,
        sizes: tuple[int, int, int, int],
        dtypes: tuple[torch.dtype, torch.dtype],
        sm_scale: float,
    ) -> None:
        page_size = sizes[3]
        for host in (starts, indptr, last):
            assert (host.device.type, host.dtype) == ("cpu", torch.int32)  # on the device, plan would synchronize
        assert indices.dtype == torch.int32
        assert len(starts) == len(indptr) == len(last) + 1
        assert len(indices) == int(indptr[-1])
        assert bool(((last >= 1) & (last <= page_size)).all())
        self._planned = starts, indptr, indices, last, sizes, dtypes, sm_scale

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
        starts, indptr, indices, last, sizes, dtypes, sm_scale = self._planned
        assert (q.shape[1], k.shape[1], q.shape[2], k.shape[2]) == sizes
        assert (q.dtype, k.dtype) == dtypes
        captured = getattr(self, "_max_total_num_rows", None)  # queries past the last row's belong to no row
        assert len(q) == (captured or int(starts[-1]))
        found = _attend(q, k, v, starts, indptr, indices, last, sm_scale)
        return found if return_lse else found[0]


class BatchPrefillWithPagedKVCacheWrapper(_Wrapper):
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
        super().__init__(float_workspace_buffer, kv_layout)
        self._buffers: list[Tensor] | None = None
        if use_cuda_graph:
            buffers = (qo_indptr_buf, paged_kv_indptr_buf, paged_kv_indices_buf, paged_kv_last_page_len_buf)
            self._buffers = [buffer for buffer in buffers if buffer is not None]
            assert len(self._buffers) == 4
            assert len(self._buffers[0]) == len(self._buffers[1]) == len(self._buffers[3]) + 1
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
    ) -> None:
        assert causal
        assert sm_scale is not None
        assert kv_data_type is not None
        starts, indptr, indices, last = qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len
        if self._buffers is not None:
            rows, most, total = len(self._buffers[3]), len(self._buffers[2]), int(starts[-1])
            self._max_total_num_rows = self._max_total_num_rows or total
            if total > self._max_total_num_rows or len(last) != rows or len(indices) > most:
                raise ValueError("cuda graph mode")
            kept = [*self._buffers]
            kept[2] = kept[2][: len(indices)]
            for buffer, new in zip(kept, (starts, indptr, indices, last), strict=True):
                buffer.copy_(new)
            starts, indptr, indices, last = kept
        sizes = num_qo_heads, num_kv_heads, head_dim_qk, page_size
        self._keep(starts, indptr, indices, last, sizes, (q_data_type, kv_data_type), sm_scale)


class BatchDecodeWithPagedKVCacheWrapper(_Wrapper):
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
        super().__init__(float_workspace_buffer, kv_layout)
        assert not use_cuda_graph
        self.use_tensor_cores = use_tensor_cores

    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
        o_data_type: torch.dtype | None = None,
        data_type: torch.dtype | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        non_blocking: bool = True,
    ) -> None:
        assert sm_scale is not None
        assert kv_data_type is not None
        starts = torch.arange(len(indptr), dtype=torch.int32)
        sizes = num_qo_heads, num_kv_heads, head_dim, page_size
        self._keep(starts, indptr, indices, last_page_len, sizes, (q_data_type, kv_data_type), sm_scale)
