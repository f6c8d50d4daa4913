"""Running out of memory: telling it from every other error, and what is said of it."""

from __future__ import annotations

import torch

_CPU_ALLOCATOR = "DefaultCPUAllocator"
"""torch has no class of its own for what its CPU allocator raises; the message names the allocator."""


class OutOfMemory(RuntimeError):
    """Memory did not suffice for a round; the engine itself goes on."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory, of a device or of the host, was asked for and not there."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _CPU_ALLOCATOR in str(error)


def what_failed(error: BaseException) -> str:
    """What to say of a rank that ends with `error`, behind its name."""
    return f"is out of memory: {error}" if is_out_of_memory(error) else f"failed: {type(error).__name__}: {error}"
