"""What the memory of this device gives a plain sequential read: the ceiling of decoding."""

from __future__ import annotations

import time

import torch


def read_bandwidth(device: torch.device, *, size: int = 1 << 30, repeats: int = 5) -> float:
    """Bytes per second of summing `size` bytes, the best of `repeats` (the others were disturbed)."""
    data = torch.ones(size // 8, dtype=torch.int64, device=device)
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        data.sum().item()
        best = min(best, time.perf_counter() - began)
    return size / best
