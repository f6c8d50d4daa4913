"""Dense decoders that differ in biases, norms of queries and keys, and sliding layers."""

from __future__ import annotations

from dataclasses import replace

from models.families.sliding import slide
from models.files.json_values import Json, flag, integer
from models.model_config import ModelConfig


def llama(data: Json, config: ModelConfig) -> ModelConfig:
    biased = flag(data, "attention_bias")
    return slide(data, replace(config, qkv_bias=biased, o_bias=biased, mlp_bias=flag(data, "mlp_bias")))


def mistral(data: Json, config: ModelConfig) -> ModelConfig:
    return slide(data, config, lambda layer: True, window=4096)


def qwen2(data: Json, config: ModelConfig) -> ModelConfig:
    return _qwen_sliding(data, replace(config, qkv_bias=True))


def qwen3(data: Json, config: ModelConfig) -> ModelConfig:
    biased = flag(data, "attention_bias")
    return _qwen_sliding(data, replace(config, qkv_bias=biased, o_bias=biased, qk_norm="head"))


def seed_oss(data: Json, config: ModelConfig) -> ModelConfig:
    return slide(
        data,
        replace(
            config,
            qkv_bias=flag(data, "attention_bias", True),
            o_bias=flag(data, "attention_out_bias"),
            mlp_bias=flag(data, "mlp_bias"),
        ),
    )


def internlm3(data: Json, config: ModelConfig) -> ModelConfig:
    """Read its own names of biases, and those that transformers gives to Llama."""
    other = flag(data, "bias", flag(data, "mlp_bias"))
    biased = flag(data, "qkv_bias", flag(data, "attention_bias"))
    return slide(data, replace(config, qkv_bias=biased, o_bias=other, mlp_bias=other))


def _qwen_sliding(data: Json, config: ModelConfig) -> ModelConfig:
    """Let the layers from max_window_layers on slide, if use_sliding_window is set."""
    if not flag(data, "use_sliding_window"):
        return slide(data, config, window=4096)
    first = integer(data, "max_window_layers", 28, minimum=0)
    return slide(data, config, lambda layer: layer >= first, window=4096)
