"""Gates and values joined by plain torch, by the formulas of kernels.ops.Gate."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from kernels.ops import Gate

GATES: tuple[Gate, ...] = get_args(Gate)


def joined(how: Gate, gate: Tensor, value: Tensor) -> Tensor:
    """gate, value: of one shape, in float32 or wider."""
    if how == "silu":
        return torch.nn.functional.silu(gate) * value
    if how == "gelu_tanh":
        return torch.nn.functional.gelu(gate, approximate="tanh") * value
    gate = gate.clamp(max=7.0)
    return gate / (1 + torch.exp(-1.702 * gate)) * (value.clamp(-7.0, 7.0) + 1)
