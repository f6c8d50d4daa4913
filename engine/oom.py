"""Detect out-of-memory errors and describe them."""

from __future__ import annotations

import torch

_SIGNS = ("DefaultCPUAllocator", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""Found in messages of errors without a class of their own: torch's CPU allocator, and CUDA outside its allocator."""


class OutOfMemory(RuntimeError):
    """Memory did not suffice for a round. No rank has finished it; the engine itself goes on."""


def is_out_of_memory(error: BaseException) -> bool:
    """Check whether an allocation failed, on a device or the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def describe_failure(error: BaseException) -> str:
    """Describe a rank that ends with `error`, to be read after its name."""
    return f"is out of memory: {error}" if is_out_of_memory(error) else f"failed: {type(error).__name__}: {error}"
