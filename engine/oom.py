"""Detect out-of-memory errors and describe them."""

from __future__ import annotations

import torch

_SIGNS = ("DefaultCPUAllocator", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""Substrings that identify errors without a class of their own: from torch's CPU allocator, and from CUDA outside its
allocator."""


class OutOfMemory(RuntimeError):
    """Memory did not suffice for a round. No rank has finished the round; the engine continues."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error is a failed allocation, on a device or the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def describe_failure(error: BaseException) -> str:
    """Describe a rank that ends with `error`, to be read after its name."""
    return f"is out of memory: {error}" if is_out_of_memory(error) else f"failed: {type(error).__name__}: {error}"
