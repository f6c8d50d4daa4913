"""Host-side checks of kernel arguments, which read no device memory."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.attention.base import Ballot
from kernels.kv.kv_bits import SEALED_GROUP
from kernels.kv.kv_pool import LayerKV

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_dtype(x: Tensor) -> None:
    """Raise ValueError for dtypes outside DTYPES: kernels would compute float64 in float32."""
    if x.dtype not in DTYPES:
        raise ValueError(f"kernels for GPUs have no {str(x.dtype).removeprefix('torch.')}")


def check_pool(kv: LayerKV) -> int:
    """Return the number of elements from one page to the next.

    Raises ValueError unless pages are contiguous and have the same strides in both tensors, and records, of pages of
    SEALED_GROUP tokens, are contiguous.
    """
    _, _, page_size, head_dim = kv.k.shape
    if kv.k.stride() != kv.v.stride() or kv.k.stride()[1:] != (page_size * head_dim, head_dim, 1):
        raise ValueError("pages of the pool are not contiguous, or keys and values lie differently")
    sealed = kv.sealed
    if sealed is not None and not (page_size == SEALED_GROUP and sealed.k.is_contiguous() and sealed.v.is_contiguous()):
        raise ValueError("records of the pool are not contiguous, or are those of other pages")
    return kv.k.stride(0)


def check_ballot(ballot: Ballot) -> None:
    """Raise ValueError unless kernels find each row's voters where they look for them."""
    if not ballot.voters.is_contiguous():
        raise ValueError("voters are not contiguous")
