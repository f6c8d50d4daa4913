"""Which kernels a model runs on."""

from __future__ import annotations

import logging
from typing import Literal

import torch

from engine.config import ConfigError
from kernels.cpu.build import KernelsUnavailable
from kernels.cpu.library import CpuKernels
from kernels.cpu.ops import CpuOps
from kernels.ops import Ops
from kernels.reference import REFERENCE
from models.default import user_cache

log = logging.getLogger(__name__)

KernelsSetting = Literal["auto", "reference", "cpu"]
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def choose_ops(setting: KernelsSetting, device: torch.device, dtype: torch.dtype) -> Ops:
    """What `engine.kernels` means for a model of this dtype on this device. The first choice of compiled ones on a
    machine compiles them.

    Raises ConfigError for kernels that were asked for by name and cannot serve.
    """
    if setting == "reference":
        return REFERENCE
    if device.type != "cpu" or dtype not in _DTYPES:
        if setting == "cpu":
            raise ConfigError(f"engine.kernels: cpu has none for {str(dtype).removeprefix('torch.')} on {device.type}")
        return REFERENCE
    try:
        return CpuOps(CpuKernels(user_cache() / "kernels"))
    except KernelsUnavailable as error:
        if setting == "cpu":
            raise ConfigError(f"engine.kernels: {error}") from error
        log.warning("no compiled kernels, several times slower without: %s", error)
        return REFERENCE
