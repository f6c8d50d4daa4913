"""OLMo 2 (arXiv 2501.00656) and OLMo 3: norms of outputs, and of all queries or keys of the model together."""

from __future__ import annotations

from dataclasses import replace

from models.families.sliding import slide
from models.files.json_values import Json, flag
from models.files.rope_config import SLIDING, RopeConfig, has_own_rope
from models.model_config import ModelConfig, WeightNames

_NAMES = WeightNames(
    before_attention="",
    after_attention="post_attention_layernorm",
    before_mlp="",
    after_mlp="post_feedforward_layernorm",
)


def olmo2(data: Json, config: ModelConfig) -> ModelConfig:
    return slide(data, _plain(data, config))


def olmo3(data: Json, config: ModelConfig) -> ModelConfig:
    """Let three of four layers slide. One scaling for all layers is that of the full ones alone."""
    config = _plain(data, config)
    if not has_own_rope(data, SLIDING):
        unscaled = RopeConfig(theta=config.rope.theta)
        config = replace(config, sliding_rope=None if unscaled == config.rope else unscaled)
    return slide(data, config, lambda layer: (layer + 1) % 4 != 0, window=4096)


def _plain(data: Json, config: ModelConfig) -> ModelConfig:
    biased = flag(data, "attention_bias")
    return replace(config, qkv_bias=biased, o_bias=biased, qk_norm="all", names=_NAMES)
