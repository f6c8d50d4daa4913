"""Ministral 3: YaRN, and queries that grow with their position."""

from __future__ import annotations

from dataclasses import replace

from models.families.sliding import slide
from models.files.json_values import Json
from models.files.rope_config import parse_rope
from models.model_config import ModelConfig

_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1000000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
"""What transformers takes for absent rope_parameters."""


def ministral3(data: Json, config: ModelConfig) -> ModelConfig:
    if not data.get("rope_parameters") and not data.get("rope_scaling"):
        rope = parse_rope({**data, "rope_parameters": _ROPE}, config.max_position_embeddings)
        config = replace(config, rope=rope)
    return slide(data, config, lambda layer: True)
