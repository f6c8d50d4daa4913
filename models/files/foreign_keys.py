"""Keys of config.json that change a model's arithmetic in ways that are not implemented. Free of torch."""

from __future__ import annotations

from typing import Any

from models.files.json_values import Json, ModelError, short
from models.files.rope_config import LAYER_TYPES

_EMPTY: tuple[Any, ...] = (None, False, 0, "", [], {})

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    # experts
    "num_experts": (),
    "num_local_experts": (),
    "n_routed_experts": (),
    "swiglu_alpha": (),
    "swiglu_limit": (),
    # layers that differ
    "block_configs": (),
    "num_key_value_heads_per_layer": (),
    # scales of activations and logits
    "attention_multiplier": (),
    "attn_logit_softcapping": (),
    "attn_temperature_tuning": (),
    "dim_model_base": (),
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1,),
    "scale_depth": (),
    "scale_emb": (1,),
    # attention
    "alibi": (),
    "attention_chunk_size": (),
    "attention_sinks": (),
    "clip_qkv": (),
    "cla_share_factor": (1,),
    "cross_attention_layers": (),
    "kv_lora_rank": (),
    "parallel_attention": (),
    "parallel_attn": (),
    "use_alibi": (),
    "use_bidirectional_attention": (),
    "use_cla": (),
    "use_logn_attn": (),
    "use_parallel_residual": (),
    "use_qk_norm": (),
    # positions
    "no_rope_layer_interval": (),
    "position_embedding_type": ("rope", "rotary", "absolute"),  # absolute: an old default of transformers, unused
    "rope_interleave": (),
    "rope_interleaved": (),
    "rotary_pct": (1,),
    "rotary_percent": (1,),
}
"""Keys, each with the values that change nothing, besides empty ones."""

_ACTIVATIONS = ("silu", "swish")


def refuse_foreign_keys(data: Json, read: frozenset[str] = frozenset()) -> None:
    """Raise ModelError if the content of config.json means another model than the one that would be computed. read:
    keys that the architecture reads itself."""
    for key, neutral in _NEUTRAL.items():
        if key not in read and data.get(key) not in (*_EMPTY, *neutral):
            raise ModelError(f"{key} {short(data[key])} is not supported")
    if data.get("is_causal") not in (None, True):
        raise ModelError("is_causal false is not supported; a text is continued by causal attention")
    for key in ("hidden_act", "hidden_activation"):
        if key not in read and data.get(key) not in (None, *_ACTIVATIONS):
            raise ModelError(f"{key} {short(data[key])} is not supported; only silu is")
    layer_types = data.get("layer_types") or []
    if not isinstance(layer_types, list) or any(kind not in LAYER_TYPES for kind in layer_types):
        raise ModelError(f"layer_types {short(layer_types)} is not supported; these are: {', '.join(LAYER_TYPES)}")
    with_rope = data.get("no_rope_layers") or []  # 1: the layer rotates
    if "no_rope_layers" not in read and (not isinstance(with_rope, list) or not all(each == 1 for each in with_rope)):
        raise ModelError(f"no_rope_layers {short(with_rope)} is not supported; all layers have rotary positions")
