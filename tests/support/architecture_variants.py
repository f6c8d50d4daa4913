"""Variants of every architecture that is served: what published configs set, in sizes that take no time.

A new architecture gets its lines in VARIANTS; tests/unit/models/architectures/test_all_families.py goes over them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from models.config import read_config
from tests.support.oracle_models import SIZES, write_checkpoint

WINDOW, ORIGINAL = 20, 32
"""Window of sliding layers, and positions that RoPE was made for: both shorter than texts of tests."""
_SIZES = SIZES | {"intermediate_size": 55, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 3}
"""Two ranks have 4 and 2 heads, 28 and 27 features, 51 and 50 tokens."""
_KEYS_OF_TODAY = ("rope_parameters", "layer_types")


@dataclass(frozen=True, slots=True)
class Variant:
    """model_type: of config.json. settings: of the config in transformers, beside sizes. old: keys that config.json has
    in place of those that only transformers 5 writes; none: it is as transformers writes it."""

    model_type: str
    settings: Mapping[str, Any]
    old: Mapping[str, Any] = field(default_factory=dict)


def heads(count: int, kv_heads: int, head_dim: int | None = None) -> dict[str, Any]:
    sizes = {"num_attention_heads": count, "num_key_value_heads": kv_heads}
    return sizes if head_dim is None else {**sizes, "head_dim": head_dim}


def kinds(pattern: str) -> list[str]:
    """Types of layers: s slides, f is full."""
    return [{"s": "sliding_attention", "f": "full_attention"}[kind] for kind in pattern]


def longrope(pairs: int, **others: Any) -> dict[str, Any]:
    short, long = [1 + i / 16 for i in range(pairs)], [1.5 + 2.5 * i for i in range(pairs)]
    return {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": short, "long_factor": long, **others}


FIVE = {**heads(5, 5, 8), "hidden_size": 40}
LINEAR = {"rope_type": "linear", "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 5000.0, "factor": 6.0}
LONG_INTERN = {"max_position_embeddings": ORIGINAL, "rope_parameters": DYNAMIC}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": ORIGINAL}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
YARN_OF_QWEN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
YARN_OF_OLMO = YARN | {"attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0}
YARN_OF_MINISTRAL = YARN | {"rope_theta": 1e6, "llama_4_scaling_beta": 0.1, "mscale": 1.0, "mscale_all_dim": 1.0}
GEMMA = {"query_pre_attn_scalar": 24, "sliding_window": WINDOW}
GEMMA_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
    "full_attention": {"rope_theta": 70000.0, **LINEAR},
}
SLIDING_QWEN = {"use_sliding_window": True, "sliding_window": WINDOW}
LONG_PHI = {"original_max_position_embeddings": ORIGINAL, "sliding_window": 10**5}
GRANITE = {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 1.25}
NO_WINDOW = {"sliding_window": None, "sliding_window_pattern": None, "layer_types": kinds("fff")}
BIASES = {"attention_bias": True, "mlp_bias": True}
MULTIPLE = {"intermediate_size": 52}  # torch multiplies by experts whose rows have multiples of 16 bytes
GPT_OSS = {**MULTIPLE, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": WINDOW}
YARN_OF_GPT_OSS = YARN | {"rope_theta": 1e4, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}

VARIANTS: dict[str, Variant] = {
    "llama-2": Variant("llama", {**FIVE, "rms_norm_eps": 1e-5}, {"rope_theta": 10000.0}),
    "llama-3.1": Variant("llama", heads(6, 3), {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
    "llama-3.2": Variant("llama", {**heads(6, 2, 16), **TIED, "rope_parameters": {"rope_theta": 5e5, **LLAMA3}}),
    "smollm2": Variant("llama", {**heads(9, 3), **TIED, "hidden_size": 54}, {"rope_theta": 1e5}),
    "llama-biases": Variant("llama", {**heads(4, 1), **BIASES}, {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "llama-yarn": Variant(
        "llama",
        {**heads(6, 3, 16)}
        | {"rope_parameters": YARN | {"rope_theta": 100.0, "beta_fast": 2.0, "beta_slow": 0.25, "truncate": False}},
    ),
    "mistral-0.1": Variant("mistral", {**heads(4, 2, 16), "sliding_window": WINDOW}, {"rope_theta": 1e4}),
    "mistral-nemo": Variant("mistral", {**heads(6, 3, 16), "sliding_window": None}),
    "ministral-8b": Variant(
        "ministral",
        {**heads(6, 3, 16), "sliding_window": WINDOW, "num_hidden_layers": 4, "layer_types": kinds("fssf")},
    ),
    "ministral-all-slide": Variant("ministral", {**heads(4, 1, 16), "sliding_window": WINDOW}),
    "ministral3": Variant("ministral3", {**heads(6, 3, 16), "rope_parameters": YARN_OF_MINISTRAL}),
    "ministral3-3b": Variant("ministral3", {**heads(4, 2, 16), **TIED, "rope_parameters": YARN_OF_MINISTRAL}),
    "qwen2.5": Variant(
        "qwen2",
        {**heads(4, 2), **TIED, "use_sliding_window": False, "sliding_window": WINDOW, "max_window_layers": 2},
        {"rope_theta": 1e6, "sliding_window": WINDOW},
    ),
    "qwen2-window": Variant("qwen2", {**FIVE, **SLIDING_QWEN, "max_window_layers": 1}, {"rope_theta": 1e6}),
    "qwen2-yarn": Variant("qwen2", {}, {"rope_theta": 1e6, "rope_scaling": YARN_OF_QWEN}),
    "qwen3": Variant("qwen3", {**heads(4, 1, 16), **TIED}),
    "qwen3-window": Variant("qwen3", {**heads(6, 3, 16), **SLIDING_QWEN, "max_window_layers": 2}),
    "qwen3-yarn": Variant(
        "qwen3",
        {**heads(4, 2, 16), "attention_bias": True},
        {"rope_theta": 1e6, "rope_scaling": {**YARN, "attention_factor": 0.8}},
    ),
    "seed_oss": Variant("seed_oss", heads(6, 3, 16)),
    "seed_oss-biases": Variant(
        "seed_oss", {**heads(4, 1, 12), "attention_out_bias": True, "mlp_bias": True, "attention_bias": False}
    ),
    "internlm3": Variant("internlm3", {**heads(6, 3, 16), **LONG_INTERN}),
    "internlm3-biases": Variant("internlm3", {**heads(4, 2, 16), **LONG_INTERN, "qkv_bias": True, "bias": True}),
    "gemma3-1b": Variant(
        "gemma3_text",
        {**heads(4, 1, 16), **GEMMA, "num_hidden_layers": 7},
        {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": None},
    ),
    "gemma3-4b": Variant(
        "gemma3_text",
        {**heads(6, 3, 16), **GEMMA},
        {"rope_theta": 5e4, "rope_local_base_freq": 400.0, "rope_scaling": LINEAR, "sliding_window_pattern": 3},
    ),
    "gemma3-biases": Variant(
        "gemma3_text",
        {**heads(4, 1, 32), **GEMMA, **BIASES, "layer_types": kinds("sfs"), "rope_parameters": GEMMA_ROPE},
    ),
    "gemma3-untied": Variant("gemma3_text", {**FIVE, **GEMMA, **UNTIED, "layer_types": kinds("ssf")}),
    "gemma3-wide-window": Variant(
        "gemma3_text", {**heads(4, 2, 16), **GEMMA, "sliding_window": 300, "layer_types": kinds("sfs")}
    ),
    "gemma3-all-slide": Variant("gemma3_text", {**heads(4, 2, 16), **GEMMA, "layer_types": kinds("sss")}),
    "olmo2": Variant("olmo2", FIVE),
    "olmo2-grouped": Variant("olmo2", {**heads(4, 2), **TIED, "attention_bias": True}, {"rope_theta": 5e5}),
    "olmo3-linear": Variant(
        "olmo3",
        {**heads(4, 1), "sliding_window": WINDOW, "num_hidden_layers": 4},
        {"rope_theta": 5e5, "rope_scaling": LINEAR},
    ),
    "olmo3-7b": Variant(
        "olmo3",
        {**heads(4, 4), "hidden_size": 64, "sliding_window": WINDOW, "num_hidden_layers": 4},
        {"rope_theta": 500000, "rope_scaling": YARN_OF_OLMO, "layer_types": kinds("sssf")},
    ),
    "olmo3-layer-types": Variant("olmo3", {**heads(4, 2), "sliding_window": WINDOW, "layer_types": kinds("fsf")}),
    "smollm3": Variant("smollm3", {**heads(4, 1), **TIED, "hidden_size": 64, "num_hidden_layers": 4}),
    "smollm3-interval": Variant("smollm3", {"no_rope_layer_interval": 2, **UNTIED}, {"rope_theta": 777.0}),
    "smollm3-list": Variant("smollm3", {**heads(4, 2), "no_rope_layers": [0, 1, 1, 0, 1]}),
    "smollm3-window": Variant("smollm3", {**SLIDING_QWEN, **BIASES, "no_rope_layer_interval": 2}),
    "phi3-4k": Variant("phi3", {**FIVE, "sliding_window": 17}),
    "phi3-128k": Variant("phi3", {**LONG_PHI, "rope_parameters": longrope(4)}),
    "phi3-old": Variant(
        "phi3",
        {**heads(4, 1), **LONG_PHI, "rope_parameters": longrope(6)},
        {"rope_theta": 1e4, "rope_scaling": longrope(6) | {"type": "longrope"}},
    ),
    "phi4-mini": Variant(
        "phi3",
        {**heads(4, 2), **TIED, **LONG_PHI, "hidden_size": 64}
        | {"rope_parameters": longrope(6, partial_rotary_factor=0.75)},
    ),
    "glm": Variant("glm", heads(6, 3, 12)),
    "glm-grouped": Variant("glm", {**heads(4, 2, 16), "attention_bias": False}, {"rope_theta": 5e4}),
    "glm4": Variant("glm4", {**heads(4, 1, 16)}),
    "glm4-yarn": Variant(
        "glm4",
        {**heads(6, 3, 16), "attention_bias": False}
        | {"rope_parameters": {**YARN, "rope_theta": 1e6, "partial_rotary_factor": 0.5}},
    ),
    "granite": Variant("granite", {**heads(6, 3), **GRANITE, **TIED, "attention_multiplier": 0.125}),
    "granite-biases": Variant(
        "granite", {**heads(4, 2), **GRANITE, **BIASES, "attention_multiplier": 0.3}, {"rope_theta": 1e7}
    ),
    "ernie4_5": Variant("ernie4_5", heads(6, 3, 16)),
    "ernie4_5-biases": Variant("ernie4_5", {**heads(4, 1), **UNTIED, "head_dim": None, "use_bias": True}),
    "exaone4-1.2b": Variant(
        "exaone4", {**heads(6, 3), **TIED, **NO_WINDOW, "rope_parameters": {"rope_theta": 1e6, **LLAMA3}}
    ),
    "exaone4-32b": Variant(
        "exaone4",
        {**heads(4, 2), "num_hidden_layers": 4, "sliding_window": WINDOW, "sliding_window_pattern": "LLLG"}
        | {"layer_types": kinds("sssf"), "rope_parameters": {"rope_theta": 1e6, **LLAMA3}},
    ),
    "mixtral": Variant("mixtral", {**heads(6, 3, 16), **MULTIPLE, "num_local_experts": 5, "num_experts_per_tok": 2}),
    "mixtral-window": Variant(
        "mixtral",
        {**heads(4, 1, 16), **MULTIPLE, "num_local_experts": 4, "num_experts_per_tok": 1, "sliding_window": WINDOW},
        {"rope_theta": 1e6},
    ),
    "qwen3_moe": Variant(
        "qwen3_moe", {**heads(4, 2, 16), "num_experts": 9, "num_experts_per_tok": 4, "moe_intermediate_size": 28}
    ),
    "qwen3_moe-plain-layers": Variant(
        "qwen3_moe",
        {**heads(6, 3, 16), "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
        | {"norm_topk_prob": True, "mlp_only_layers": [0], "attention_bias": True},
    ),
    "qwen3_moe-sparse-step": Variant(
        "qwen3_moe",
        {**heads(4, 1, 16), "num_experts": 4, "num_experts_per_tok": 3, "moe_intermediate_size": 28}
        | {"decoder_sparse_step": 2},
        {"rope_theta": 1e6},
    ),
    "qwen2_moe": Variant(
        "qwen2_moe",
        {**FIVE, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 28}
        | {"shared_expert_intermediate_size": 31},
    ),
    "qwen2_moe-grouped": Variant(
        "qwen2_moe",
        {**heads(4, 2), "hidden_size": 64, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
        | {"shared_expert_intermediate_size": 40, "norm_topk_prob": True},
        {"rope_theta": 1e6},
    ),
    "olmoe": Variant(
        "olmoe", {**heads(6, 6, 8), **MULTIPLE, "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": False}
    ),
    "olmoe-grouped": Variant(
        "olmoe",
        {
            **heads(4, 2),
            "hidden_size": 64,
            **MULTIPLE,
            "num_experts": 7,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
        },
    ),
    "gpt_oss": Variant(
        "gpt_oss",
        {**heads(6, 3, 16), **GPT_OSS, "layer_types": kinds("sfs"), "rope_parameters": YARN_OF_GPT_OSS},
    ),
    "gpt_oss-full": Variant(
        "gpt_oss",
        {**heads(4, 1, 16), **GPT_OSS, "layer_types": kinds("fff"), "attention_bias": False}
        | {"rope_parameters": YARN_OF_GPT_OSS},
    ),
}


def transformers_config(variant: Variant) -> Any:
    return transformers.AutoConfig.for_model(variant.model_type, **{**_SIZES, **variant.settings})


def write_variant(variant: Variant, directory: Path) -> Any:
    """Write a checkpoint. Returns the model that transformers reads from it. One with dynamic RoPE has read a text of
    all positions: it rotates by the longest one, until one has fewer than the original positions."""
    without = _KEYS_OF_TODAY if variant.old else ()
    model = write_checkpoint(directory, transformers_config(variant), changes=dict(variant.old), without=without)
    config = read_config(directory)
    if config.rope.kind == "dynamic":
        with torch.inference_mode():
            model(torch.ones(1, config.max_model_len, dtype=torch.int64))
    return model
