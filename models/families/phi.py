"""Phi-3 and Phi-4-mini: joined matrices, rotation of part of a head, longrope."""

from __future__ import annotations

from dataclasses import replace

from models.families.sliding import slide
from models.files.json_values import Json
from models.model_config import ModelConfig, WeightNames


def phi3(data: Json, config: ModelConfig) -> ModelConfig:
    names = WeightNames(qkv="qkv_proj", gate_up="gate_up_proj")
    return slide(data, replace(config, names=names), lambda layer: True)
