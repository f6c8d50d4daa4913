"""Layers that slide."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from models.files.json_values import Json, ModelError, integer
from models.files.rope_config import SLIDING
from models.model_config import ModelConfig


def slide(
    data: Json, config: ModelConfig, slides: Callable[[int], bool] = lambda layer: False, window: int | None = None
) -> ModelConfig:
    """Set the layers that slide: those that layer_types names, or, without it, those for which `slides` holds.

    config: its sliding_rope is that of layers that slide. window: sliding_window where the key is absent. A window of
    null slides nowhere, unless layer_types or a rotary embedding of their own tells such layers apart. Raises
    ModelError.
    """
    layers = marked_layers(data, config, slides)
    if not layers:
        return replace(config, sliding_rope=None)
    default = window if "sliding_window" not in data else None
    is_alike = config.sliding_rope is None
    if is_alike and not data.get("layer_types") and data.get("sliding_window", default) is None:
        return config
    size = integer(data, "sliding_window", default)
    if size >= config.max_position_embeddings and is_alike:  # it hides nothing
        return config
    return replace(config, sliding_window=size, sliding_layers=layers)


def marked_layers(data: Json, config: ModelConfig, slides: Callable[[int], bool]) -> tuple[int, ...]:
    """Return the layers that layer_types names as sliding, or, without it, those for which `slides` holds, whatever the
    window. Raises ModelError."""
    types = data.get("layer_types") or []
    if types and len(types) != config.num_layers:
        raise ModelError(f"layer_types has {len(types)} entries for {config.num_layers} layers (num_hidden_layers)")
    return tuple(layer for layer in range(config.num_layers) if (types[layer] == SLIDING if types else slides(layer)))
