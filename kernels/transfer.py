"""From the host to where kernels run."""

from __future__ import annotations

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on `device`, without waiting: to a GPU from pinned memory, which torch keeps until it has been
    read. Shares the memory of `tensor` where the device is the host."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
