"""What kernels can be asked of: checked on the host, from shapes alone."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.kv_cache import LayerKV

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_dtype(x: Tensor) -> None:
    """Raises ValueError for float64, which would be computed in float32."""
    if x.dtype not in DTYPES:
        raise ValueError(f"kernels for GPUs have no {str(x.dtype).removeprefix('torch.')}")


def check_pool(kv: LayerKV) -> int:
    """Elements from one page to the next; pages themselves are contiguous and lie alike in both tensors.

    Raises ValueError where they do not.
    """
    _, _, page_size, head_dim = kv.k.shape
    if kv.k.stride() != kv.v.stride() or kv.k.stride()[1:] != (page_size * head_dim, head_dim, 1):
        raise ValueError("pages of the pool are not contiguous, or keys and values lie differently")
    return kv.k.stride(0)
