"""Choose the kernels that a model runs on."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from engine.config.deployment import ConfigError
from kernels.cpu.compiler import KernelsUnavailable
from kernels.cpu.cpu_ops import CpuOps
from kernels.cpu.library import CpuKernels
from kernels.cpu.micro_profile import measured_choice
from kernels.flashinfer.flashinfer_modules import ModulesUnavailable, load_modules, try_attention
from kernels.kv.kv_formats import KV_FORMATS
from kernels.ops import Ops
from kernels.reference_ops import REFERENCE
from models.default import user_cache

log = logging.getLogger(__name__)

KernelsSetting = Literal["auto", "reference", "cpu", "triton", "flashinfer"]
_HALVES = (torch.bfloat16, torch.float16)


def choose_ops(
    setting: KernelsSetting,
    device: torch.device,
    dtype: torch.dtype,
    head_dims: Sequence[int],
    compiling: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    *,
    kv_format: str = "dense",
) -> Ops:
    """Choose kernels for models of this dtype on this device. The first use of compiled kernels on a machine compiles
    them; kernels that cannot be compiled, loaded or run here are not available.

    setting: `engine.kernels`. head_dims: those of the target and, if there is one, the draft model. compiling: entered
    while a compiler of GPU kernels works, which takes minutes. kv_format: `engine.cache.format`, which FlashInfer may
    not read.
    Raises ConfigError if kernels that the setting names are not available.
    """
    if setting == "reference":
        return REFERENCE
    if setting != "auto":
        return _named(setting, device, dtype, head_dims, compiling, kv_format)
    reasons = []
    for name in ("cpu",) if device.type == "cpu" else ("flashinfer", "triton"):
        try:
            return _named(name, device, dtype, head_dims, compiling, kv_format)
        except ConfigError as error:
            reasons.append(str(error).removeprefix("engine.kernels: "))
            if isinstance(error.__cause__, ModulesUnavailable):
                log.warning("attention runs in Triton: %s", reasons[-1])
    if dtype != torch.float64:  # only plain torch has float64
        log.warning("falling back to plain torch, several times slower than kernels: %s", "; ".join(reasons))
    return REFERENCE


def kernels_folder() -> Path | None:
    """Return the folder for kernels compiled on this machine; None for a user without a home directory."""
    try:
        return user_cache() / "kernels"
    except OSError:
        return None


def _named(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dims: Sequence[int],
    compiling: Callable[[], AbstractContextManager[None]],
    kv_format: str,
) -> Ops:
    dtypes = _HALVES if name == "flashinfer" else (torch.float32, *_HALVES)
    if (name == "cpu") != (device.type == "cpu") or dtype not in dtypes:
        named = str(dtype).removeprefix("torch.")
        raise ConfigError(f"engine.kernels: {name} has none for {named} on {device.type}")
    try:
        if name == "cpu":
            folder = kernels_folder()
            choice, profile = measured_choice(folder)
            return CpuOps(CpuKernels(folder, choice), profile)
        # Imported where there is a GPU.
        from kernels.flashinfer.flashinfer_workspace import HEAD_DIMS, READABLE_KV, make_workspace
        from kernels.gpu.cuda_graphs import CudaGraphs
        from kernels.gpu.gpu_ops import GpuOps
        from kernels.gpu.products.fp8_products import multiplies_fp8

        make_gpu_ops = partial(
            GpuOps, make_recorder=partial(CudaGraphs, device), multiplies_fp8=multiplies_fp8(device, dtype)
        )
        if name == "triton":
            return make_gpu_ops()
        if head_dims[0] not in HEAD_DIMS:
            raise KernelsUnavailable(f"flashinfer has none for head_dim {head_dims[0]}")
        if kv_format not in READABLE_KV:
            raise KernelsUnavailable(f"flashinfer does not read {kv_format} KV; triton does")
        known = [head_dim for head_dim in dict.fromkeys(head_dims) if head_dim in HEAD_DIMS]
        load_modules(device, dtype, known, compiling)
        if (written := KV_FORMATS[kv_format].dtype) is not None:
            load_modules(device, dtype, known[:1], compiling, written)
        workspace = make_workspace(device)
        for head_dim in known:
            try_attention(workspace, dtype, head_dim)
        return make_gpu_ops(workspace)
    except (KernelsUnavailable, ImportError) as error:
        raise ConfigError(f"engine.kernels: {error}") from error
