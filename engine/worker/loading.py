"""Models as settings describe them."""

from __future__ import annotations

import torch

from engine.config.deployment import EngineConfig
from engine.worker.resolve import Sizes, size_up
from models.llama import Llama
from models.loader import load_model
from parallel.group import Group


def load_shard(config: EngineConfig, sizes: Sizes, device: torch.device, group: Group, *, progress: bool) -> Llama:
    """This rank's shard of the target. sizes: of the config. device: this rank's. progress: a bar on stderr."""
    return load_model(
        sizes.path,
        dtype=sizes.dtype,
        device=device,
        group=group,
        progress=progress,
        ops=sizes.ops,
        int8=config.weights == "int8",
    )


def load_target(config: EngineConfig, *, progress: bool) -> Llama:
    """The target, all of it, for several engines of this process to share."""
    sizes = size_up(config.model_copy(update={"tensor_parallel_size": 1}), None)
    return load_shard(config, sizes, sizes.device, Group.single(), progress=progress)
