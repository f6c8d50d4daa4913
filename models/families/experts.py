"""Decoders with a mixture of experts."""

from __future__ import annotations

from dataclasses import replace

from models.families.sliding import slide
from models.files.json_values import MAX_PARTS, Json, ModelError, flag, integer, short
from models.model_config import ExpertsConfig, ModelConfig, WeightNames

COUNTS = frozenset({"num_experts", "num_local_experts"})
"""Names of the number of experts: the models' own, and those that transformers gives to it."""

DENSE_LAYERS = ("mlp_only_layers", "decoder_sparse_step")
"""Keys that tell which layers have no experts."""


def mixtral(data: Json, config: ModelConfig) -> ModelConfig:
    names = WeightNames(experts="block_sparse_moe", gate="w1", up="w3", down="w2")
    experts = _experts(data, count=8, per_token=2, size=config.intermediate_size, normalised=True)
    return slide(data, replace(config, experts=experts, names=names), lambda layer: True)


def qwen2_moe(data: Json, config: ModelConfig) -> ModelConfig:
    experts = _experts(
        data,
        count=60,
        per_token=4,
        size=integer(data, "moe_intermediate_size", 1408),
        normalised=flag(data, "norm_topk_prob"),
        shared_size=integer(data, "shared_expert_intermediate_size", 5632),
        dense_layers=_dense_layers(data, config.num_layers),
    )
    config = replace(config, qkv_bias=flag(data, "qkv_bias", True), experts=experts)
    if not flag(data, "use_sliding_window"):
        return slide(data, config, window=4096)
    end = integer(data, "max_window_layers", 28, minimum=0)
    return slide(data, config, lambda layer: layer % 2 == 0 and layer < end, window=4096)


def qwen3_moe(data: Json, config: ModelConfig) -> ModelConfig:
    experts = _experts(
        data,
        count=128,
        per_token=8,
        size=integer(data, "moe_intermediate_size", 768),
        normalised=flag(data, "norm_topk_prob"),
        dense_layers=_dense_layers(data, config.num_layers),
    )
    biased = flag(data, "attention_bias")
    config = replace(config, qkv_bias=biased, o_bias=biased, qk_norm="head", experts=experts)
    slides = flag(data, "use_sliding_window")
    return slide(data, config, lambda layer: slides, window=4096)


def olmoe(data: Json, config: ModelConfig) -> ModelConfig:
    experts = _experts(
        data, count=64, per_token=8, size=config.intermediate_size, normalised=flag(data, "norm_topk_prob")
    )
    biased = flag(data, "attention_bias")
    return slide(data, replace(config, qkv_bias=biased, o_bias=biased, qk_norm="all", experts=experts))


def count_experts(data: Json, count: int, per_token: int) -> tuple[int, int]:
    """Parse the number of experts, and of those that compute a token. count, per_token: those of an absent key. Raises
    ModelError."""
    stated = {integer(data, key, maximum=MAX_PARTS) for key in COUNTS if data.get(key) is not None}
    if len(stated) > 1:
        raise ModelError(f"{' and '.join(sorted(COUNTS))} contradict each other")
    count = next(iter(stated), count)
    per_token = integer(data, "num_experts_per_tok", per_token)
    if per_token > count:
        raise ModelError(f"num_experts_per_tok ({per_token}) is larger than the number of experts ({count})")
    return count, per_token


def _experts(
    data: Json,
    *,
    count: int,
    per_token: int,
    size: int,
    normalised: bool,
    shared_size: int = 0,
    dense_layers: tuple[int, ...] = (),
) -> ExpertsConfig:
    """count, per_token: those of an absent key."""
    count, per_token = count_experts(data, count, per_token)
    return ExpertsConfig(
        count=count,
        per_token=per_token,
        size=size,
        normalised=normalised,
        shared_size=shared_size,
        dense_layers=dense_layers,
    )


def _dense_layers(data: Json, num_layers: int) -> tuple[int, ...]:
    """Return the layers without experts: those of mlp_only_layers, and all but each decoder_sparse_step-th."""
    only = data.get("mlp_only_layers") or []
    if not isinstance(only, list) or any(isinstance(each, bool) or not isinstance(each, int) for each in only):
        raise ModelError(f"mlp_only_layers {short(only)} is not a list of layers")
    step = integer(data, "decoder_sparse_step", 1)
    return tuple(layer for layer in range(num_layers) if layer in only or (layer + 1) % step)
