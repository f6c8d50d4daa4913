"""gpt-oss."""

from __future__ import annotations

from dataclasses import replace

from models.families.experts import COUNTS, count_experts
from models.families.sliding import slide
from models.files.json_values import Json, ModelError, flag, integer, number
from models.files.rope_config import RopeConfig
from models.model_config import ExpertsConfig, ModelConfig, WeightNames

GATE = {"swiglu_limit": 7.0, "swiglu_alpha": 1.702}
"""Constants of the gate clamped_silu (kernels.ops.Gate), which are all that is served."""
READS = COUNTS | GATE.keys()

_ROPE = RopeConfig(kind="yarn", factor=32.0, original_max_positions=4096, truncate=False)
"""Rotary embedding where config.json has none, but for theta."""
_NAMES = WeightNames(router="router", stacks_experts=True)


def gpt_oss(data: Json, config: ModelConfig) -> ModelConfig:
    for key, served in GATE.items():
        if (stated := number(data, key, served)) != served:
            raise ModelError(f"{key} {stated:g} is not supported; {served:g} is")
    count, per_token = count_experts(data, count=128, per_token=4)
    _refuse_other(data, "experts_per_token", "num_experts_per_tok", per_token)
    if not data.get("rope_scaling") and not data.get("rope_parameters"):
        config = replace(config, rope=replace(_ROPE, theta=config.rope.theta))
    if config.rope.kind == "yarn":
        original = config.rope.original_max_positions
        _refuse_other(data, "initial_context_length", "original_max_position_embeddings", original)
    biased = flag(data, "attention_bias", True)
    config = replace(
        config,
        qkv_bias=biased,
        o_bias=biased,
        has_sinks=True,
        activation="clamped_silu",
        experts=ExpertsConfig(count=count, per_token=per_token, size=config.intermediate_size, biased=True),
        names=_NAMES,
    )
    return slide(data, config, lambda layer: layer % 2 == 0, window=128)


def _refuse_other(data: Json, key: str, same: str, value: int) -> None:
    """Raise ModelError if OpenAI's own name of a key says something else than transformers' name, which counts."""
    if data.get(key) is not None and (stated := integer(data, key)) != value:
        raise ModelError(f"{key} {stated} contradicts {same} {value}")
