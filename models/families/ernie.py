"""ERNIE 4.5: Llama that rotates neighbouring elements, with one switch for all biases."""

from __future__ import annotations

from dataclasses import replace

from models.families.sliding import slide
from models.files.json_values import Json, flag
from models.model_config import ModelConfig


def ernie4_5(data: Json, config: ModelConfig) -> ModelConfig:
    biased, rope = flag(data, "use_bias"), replace(config.rope, interleaved=True)
    return slide(data, replace(config, rope=rope, qkv_bias=biased, o_bias=biased, mlp_bias=biased))
