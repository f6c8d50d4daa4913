"""SmolLM3: a decoder in which every fourth layer has no rotary embedding (NoPE, arXiv 2305.19466)."""

from __future__ import annotations

from dataclasses import replace

from models.families.sliding import slide
from models.files.json_values import Json, ModelError, flag, integer
from models.model_config import ModelConfig

READS = frozenset({"no_rope_layers", "no_rope_layer_interval"})
"""Keys that differ from those of other decoders."""


def smollm3(data: Json, config: ModelConfig) -> ModelConfig:
    """Parse no_rope_layers, in which 0 marks a layer without rotary embedding, or no_rope_layer_interval. Without
    layer_types, these layers slide if use_sliding_window is set."""
    rotates = data.get("no_rope_layers")
    if rotates is None:
        interval = integer(data, "no_rope_layer_interval", 4)
        rotates = [(layer + 1) % interval for layer in range(config.num_layers)]
    elif not isinstance(rotates, list) or any(each not in (0, 1) for each in rotates):
        raise ModelError("no_rope_layers is not a list of 0 and 1")
    elif len(rotates) < config.num_layers:  # more are left over, as in transformers
        raise ModelError(f"no_rope_layers has {len(rotates)} entries for {config.num_layers} layers")
    unrotated = tuple(layer for layer in range(config.num_layers) if not rotates[layer])
    biased = flag(data, "attention_bias")
    config = replace(
        config, qkv_bias=biased, o_bias=biased, mlp_bias=flag(data, "mlp_bias"), unrotated_layers=unrotated
    )
    sliding = flag(data, "use_sliding_window")
    return slide(data, config, lambda layer: sliding and layer in unrotated)
