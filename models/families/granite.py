"""Granite 3: Llama with constant factors of embeddings, scores, residual outputs and logits."""

from __future__ import annotations

from dataclasses import replace

from models.families import plain
from models.files.json_values import Json, number
from models.model_config import ModelConfig

MULTIPLIERS = frozenset({"attention_multiplier", "embedding_multiplier", "logits_scaling", "residual_multiplier"})


def granite(data: Json, config: ModelConfig) -> ModelConfig:
    """logits_scaling is a divisor; attention_multiplier takes the place of head_dim ** -0.5."""
    scaled = replace(
        config,
        embedding_scale=number(data, "embedding_multiplier", 1.0),
        residual_scale=number(data, "residual_multiplier", 1.0),
        logits_scale=1 / number(data, "logits_scaling", 1.0),
        attention_scale=number(data, "attention_multiplier", 1.0),
    )
    return plain.llama(data, scaled)
