"""GLM-4: a joined matrix of gate and up, rotation of neighbouring elements of half of a head; in GLM-4-0414 also norms
behind attention and the feed-forward network."""

from __future__ import annotations

from dataclasses import replace

from models.families.sliding import slide
from models.files.json_values import Json, flag, integer
from models.files.rope_config import parse_rope
from models.model_config import ModelConfig, WeightNames


def glm(data: Json, config: ModelConfig) -> ModelConfig:
    return _glm(data, config, WeightNames(gate_up="gate_up_proj"))


def glm4(data: Json, config: ModelConfig) -> ModelConfig:
    names = WeightNames(
        after_attention="post_self_attn_layernorm", after_mlp="post_mlp_layernorm", gate_up="gate_up_proj"
    )
    return _glm(data, config, names)


def _glm(data: Json, config: ModelConfig, names: WeightNames) -> ModelConfig:
    positions = integer(data, "max_position_embeddings", config.max_position_embeddings)
    rope = replace(parse_rope({"partial_rotary_factor": 0.5, **data}, positions), interleaved=True)
    return slide(data, replace(config, rope=rope, qkv_bias=flag(data, "attention_bias", True), names=names))
