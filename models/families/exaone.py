"""EXAONE 4.0: norms only behind attention and the feed-forward network, and, where some layers slide, no rotation in
the others."""

from __future__ import annotations

from dataclasses import replace

from models.families.sliding import slide
from models.files.json_values import Json, ModelError, integer, short
from models.files.rope_config import FULL, SLIDING
from models.model_config import ModelConfig, WeightNames

_WINDOW, _PATTERN = 4096, 4
_NAMES = WeightNames(
    before_attention="",
    after_attention="post_attention_layernorm",
    before_mlp="",
    after_mlp="post_feedforward_layernorm",
)


def exaone4(data: Json, config: ModelConfig) -> ModelConfig:
    def slides(layer: int) -> bool:
        return _slides(data, layer, config.num_layers)

    config = slide(data, replace(config, qk_norm="head", names=_NAMES), slides, window=_WINDOW)
    if data.get("sliding_window", _WINDOW) is None:  # all layers rotate
        return config
    layers = range(config.num_layers)
    types = data.get("layer_types") or [SLIDING if slides(layer) else FULL for layer in layers]
    return replace(config, unrotated_layers=tuple(layer for layer in layers if types[layer] != SLIDING))


def _slides(data: Json, layer: int, num_layers: int) -> bool:
    """Whether a layer slides by sliding_window_pattern: a number n, of which each n-th layer does not, or a repeated
    text of L for those that do and G for others, of which the last layer is always one."""
    pattern = data.get("sliding_window_pattern", _PATTERN)
    if isinstance(pattern, str):
        if not set(pattern) <= {"L", "G"} or not pattern:
            raise ModelError(f"sliding_window_pattern {short(pattern)} is not a text of L and G")
        return pattern[layer % len(pattern)] == "L" and layer != num_layers - 1
    return bool(pattern) and (layer + 1) % integer(data, "sliding_window_pattern", _PATTERN) != 0
