"""Parameters counted from a config are those of transformers' model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from models.model_config import ExpertsConfig, ModelConfig, WeightNames
from models.shapes import parameters

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 36,
    "intermediate_size": 40,
    "head_dim": 10,
    "max_position_embeddings": 64,
}
KEYS = SIZES | {"num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2}
PLAIN = ModelConfig(**SIZES, num_layers=4, num_heads=6, num_kv_heads=2)
FOUR_NORMS = WeightNames(after_attention="a", before_mlp="b", after_mlp="c")
CASES: dict[str, tuple[dict[str, Any], ModelConfig]] = {
    "llama": ({"attention_bias": True, "mlp_bias": True}, replace(PLAIN, qkv_bias=True, o_bias=True, mlp_bias=True)),
    "qwen3": ({"tie_word_embeddings": True}, replace(PLAIN, qk_norm="head", tie_word_embeddings=True)),
    "olmo2": (
        {"head_dim": 12, "num_attention_heads": 3, "num_key_value_heads": 1},  # always hidden_size by heads
        replace(
            PLAIN,
            head_dim=12,
            num_heads=3,
            num_kv_heads=1,
            qk_norm="all",
            names=WeightNames(before_attention="", before_mlp="", after_attention="a", after_mlp="b"),
        ),
    ),
    "glm4": (
        {"attention_bias": True, "pad_token_id": 0},  # joined gate and up
        replace(PLAIN, qkv_bias=True, names=replace(FOUR_NORMS, gate_up="gate_up_proj")),
    ),
    "gemma3_text": ({}, replace(PLAIN, qk_norm="head", names=FOUR_NORMS, tie_word_embeddings=True)),
    "mixtral": (
        {"num_local_experts": 8, "num_experts_per_tok": 2},
        replace(PLAIN, experts=ExpertsConfig(count=8, per_token=2, size=40)),
    ),
    "qwen3_moe": (
        {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "mlp_only_layers": [0, 2]},
        replace(PLAIN, qk_norm="head", experts=ExpertsConfig(count=8, per_token=2, size=12, dense_layers=(0, 2))),
    ),
    "qwen2_moe": (
        {
            "head_dim": 12,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 12,
            "shared_expert_intermediate_size": 20,
        },
        replace(
            PLAIN,
            head_dim=12,
            num_heads=3,
            num_kv_heads=1,
            qkv_bias=True,
            experts=ExpertsConfig(count=8, per_token=2, size=12, shared_size=20),
        ),
    ),
    "gpt_oss": (
        {"num_local_experts": 8, "num_experts_per_tok": 2},
        replace(
            PLAIN,
            qkv_bias=True,
            o_bias=True,
            has_sinks=True,
            experts=ExpertsConfig(count=8, per_token=2, size=40, biased=True),
        ),
    ),
}


@pytest.mark.parametrize("model_type", CASES)
def test_are_those_of_transformers(model_type: str) -> None:
    keys, config = CASES[model_type]
    theirs = AutoConfig.for_model(model_type, **KEYS | {"tie_word_embeddings": False} | keys)
    if model_type == "gemma3_text":
        theirs.tie_word_embeddings = True
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(theirs)  # type: ignore[no-untyped-call]
    assert parameters(config) == sum(each.numel() for each in model.parameters())
