"""Copies between the host and a device without one waiting for the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to `device` without waiting.

    A copy to a GPU goes through pinned memory, which torch keeps until it has been read. If the device is the host, the
    result shares the memory of `tensor`.
    """
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def send_all(device: torch.device, *arrays: npt.NDArray[np.int64]) -> Sequence[Tensor]:
    """Copy host arrays [n] to `device` by one copy, without waiting. Returns a tensor of each."""
    packed = send(torch.from_numpy(np.concatenate(arrays)), device)
    return torch.split(packed, [len(array) for array in arrays])


def fetch(tensor: Tensor) -> Callable[[], Tensor]:
    """Start copying a tensor to the host, after the work enqueued on its device so far.

    Returns a function that waits for the copy, but not for work enqueued later, and returns the copy.
    """
    if tensor.device.type != "cuda":
        return lambda: tensor
    copied = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copied.copy_(tensor, non_blocking=True)
    there = torch.cuda.Event()  # type: ignore[no-untyped-call]
    there.record()

    def wait() -> Tensor:
        there.synchronize()
        return copied

    return wait
