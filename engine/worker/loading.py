"""Load models as settings describe them."""

from __future__ import annotations

import torch

from engine.config.deployment import EngineConfig
from engine.worker.resolve import Resolved, resolve
from engine.worker.weight_choice import target_weights
from models.config import ModelConfig
from models.decoder import DecoderModel
from models.loader import load_model
from parallel.group import Group
from parallel.matrix_layer import WeightChoice


def load_shard(
    config: EngineConfig,
    resolved: Resolved,
    device: torch.device,
    group: Group,
    *,
    progress: bool,
    like: ModelConfig | None = None,
    weights: WeightChoice | None = None,
) -> DecoderModel:
    """Load this rank's shard of the target. device: this rank's. progress: show a bar on stderr. like: see load_model.
    weights: formats; None: those that settings name."""
    return load_model(
        resolved.path,
        dtype=resolved.dtype,
        device=device,
        group=group,
        progress=progress,
        max_positions=resolved.max_model_len,
        ops=resolved.ops,
        weights=target_weights(config, resolved.ops) if weights is None else weights,
        like=like,
    )


def load_target(config: EngineConfig, *, progress: bool) -> DecoderModel:
    """Load the whole target, for benchmarks, or for several engines of this process to share. It has positions for
    config.max_model_len, or for the model's own length."""
    resolved = resolve(config.model_copy(update={"tensor_parallel_size": 1}), None, sizes_pool=False)
    return load_shard(config, resolved, resolved.device, Group.single(), progress=progress)
