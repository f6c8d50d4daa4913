"""Running out of memory: telling it from every other error, and what is said of it."""

from __future__ import annotations

import torch

_SIGNS = ("DefaultCPUAllocator", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""In messages of errors that have no class of their own: of torch's CPU allocator, and of CUDA beside its allocator."""


class OutOfMemory(RuntimeError):
    """Memory did not suffice for a round, which no rank has finished then; the engine itself goes on."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory, of a device or of the host, was asked for and not there."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def what_failed(error: BaseException) -> str:
    """What to say of a rank that ends with `error`, behind its name."""
    return f"is out of memory: {error}" if is_out_of_memory(error) else f"failed: {type(error).__name__}: {error}"
