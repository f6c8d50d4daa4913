"""Contents of config.json files."""

from __future__ import annotations

from typing import Any

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
}

SMALL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 29,
    "hidden_size": 16,
    "intermediate_size": 11,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "eos_token_id": 2,
}
"""A model whose sizes are odd where ranks split it."""


def llama(**changes: Any) -> dict[str, Any]:
    return {**LLAMA, **changes}


def of_type(model_type: str, **changes: Any) -> dict[str, Any]:
    """Build a config in the form of that family's files: no rope_scaling, matching heads."""
    names = {"mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    architectures = [f"{names[model_type]}ForCausalLM"]
    return llama(model_type=model_type, architectures=architectures, rope_scaling=None, **changes)


def without(data: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key not in keys}
