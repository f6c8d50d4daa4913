"""Measure the memory bandwidth of a device, by a sequential read or a copy: the upper bound of decode speed."""

from __future__ import annotations

import time

import torch


def read_bandwidth(device: torch.device, *, size: int = 1 << 30, repeats: int = 5) -> float:
    """Measure bytes per second of summing `size` bytes: the best of `repeats`, because other load slows the rest."""
    data = torch.ones(size // 8, dtype=torch.int64, device=device)
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        data.sum().item()
        best = min(best, time.perf_counter() - began)
    return size / best


def copy_bandwidth(device: torch.device, *, size: int = 2 << 30, repeats: int = 10) -> float:
    """Measure bytes per second, read plus written, of copying `size` bytes: the best of `repeats`."""
    source = torch.ones(size // 8, dtype=torch.int64, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(repeats):
        wait(device)
        began = time.perf_counter()
        target.copy_(source)
        wait(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size / best


def wait(device: torch.device) -> None:
    """Wait until the device has finished all submitted work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
