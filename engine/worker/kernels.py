"""Choose the kernels that a model runs on."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from engine.config.deployment import ConfigError
from kernels.cpu.compiler import KernelsUnavailable
from kernels.cpu.cpu_ops import CpuOps
from kernels.cpu.library import CpuKernels
from kernels.cpu.micro_profile import choose
from kernels.ops import Ops
from kernels.reference_ops import REFERENCE
from models.default import user_cache

log = logging.getLogger(__name__)

KernelsSetting = Literal["auto", "reference", "cpu", "triton", "flashinfer"]
_HALVES = (torch.bfloat16, torch.float16)


def choose_ops(setting: KernelsSetting, device: torch.device, dtype: torch.dtype) -> Ops:
    """Choose kernels for a model of this dtype on this device. setting: `engine.kernels`. The first use of compiled
    kernels on a machine compiles them.

    Raises ConfigError if kernels that the setting names are not available.
    """
    if setting == "reference":
        return REFERENCE
    if setting != "auto":
        return _named(setting, device, dtype)
    reasons = []
    for name in ("cpu",) if device.type == "cpu" else ("flashinfer", "triton"):
        try:
            return _named(name, device, dtype)
        except ConfigError as error:
            reasons.append(str(error).removeprefix("engine.kernels: "))
    if dtype != torch.float64:  # only plain torch has float64
        log.warning("falling back to plain torch, several times slower than kernels: %s", "; ".join(reasons))
    return REFERENCE


def kernels_folder() -> Path | None:
    """Return the folder for kernels compiled on this machine; None for a user without a home directory."""
    try:
        return user_cache() / "kernels"
    except OSError:
        return None


def _named(name: str, device: torch.device, dtype: torch.dtype) -> Ops:
    dtypes = _HALVES if name == "flashinfer" else (torch.float32, *_HALVES)
    if (name == "cpu") != (device.type == "cpu") or dtype not in dtypes:
        named = str(dtype).removeprefix("torch.")
        raise ConfigError(f"engine.kernels: {name} has none for {named} on {device.type}")
    try:
        if name == "cpu":
            return CpuOps(CpuKernels(kernels_folder(), choose(kernels_folder())))
        # Imported where there is a GPU.
        from kernels.attention.flashinfer_workspace import load_flashinfer, make_workspace
        from kernels.gpu.cuda_graphs import CudaGraphs
        from kernels.gpu.gpu_ops import GpuOps

        if name == "triton":
            return GpuOps(make_recorder=partial(CudaGraphs, device))
        load_flashinfer()
        return GpuOps(make_workspace(device), partial(CudaGraphs, device))
    except (KernelsUnavailable, ImportError) as error:
        raise ConfigError(f"engine.kernels: {error}") from error
