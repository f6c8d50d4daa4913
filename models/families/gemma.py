"""Gemma 3 (arXiv 2503.19786): norms on both sides, scaled embeddings, five sliding layers to a full one."""

from __future__ import annotations

from dataclasses import replace

from models.families.sliding import slide
from models.files.json_values import Json, ModelError, flag, integer, number, short
from models.files.rope_config import SLIDING, RopeConfig, has_own_rope, parse_rope
from models.model_config import ModelConfig, WeightNames

READS = frozenset({"query_pre_attn_scalar", "hidden_activation", "hidden_act"})
"""Keys that differ from those of other decoders."""
_GELU = "gelu_pytorch_tanh"
_NAMES = WeightNames(
    after_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
)


def gemma3_text(data: Json, config: ModelConfig) -> ModelConfig:
    """Read positions as config.json states them: the scaling of full layers has brought the model there already."""
    activation = data.get("hidden_activation")
    if activation not in (None, _GELU):
        raise ModelError(f"hidden_activation {short(activation)} is not supported for gemma3_text; only {_GELU} is")
    pattern = integer(data, "sliding_window_pattern", integer(data, "_sliding_window_pattern", 6))
    positions = integer(data, "max_position_embeddings", 131072)
    local = RopeConfig(theta=number(data, "rope_local_base_freq", 10000.0))
    if has_own_rope(data, SLIDING):
        local = parse_rope(data | {"rope_theta": None}, positions, SLIDING, local)
    biased = flag(data, "attention_bias")
    config = replace(
        config,
        max_position_embeddings=positions,
        sliding_rope=None if local == config.rope else local,
        embedding_scale=config.hidden_size**0.5,
        attention_scale=number(data, "query_pre_attn_scalar", 256) ** -0.5,
        activation="gelu_tanh",
        norms_from_one=True,
        qk_norm="head",
        qkv_bias=biased,
        o_bias=biased,
        names=_NAMES,
    )
    return slide(data, config, lambda layer: (layer + 1) % pattern != 0, window=4096)
