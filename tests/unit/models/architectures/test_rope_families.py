"""Architectures that rotate otherwise than Llama, or join its matrices, against transformers: logits of prompts longer
than the original positions and than windows, on several ranks, and greedy texts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from models.config import ModelError, parse_config, read_config
from models.loader import random_model
from parallel.group import Group
from tests.support.rig import CPU, compiled
from tests.support.rope_models import SIZES, assert_same, load, logits_of, make_theirs, prompt

LENGTH = 90
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32}


def longrope(pairs: int, **others: Any) -> dict[str, Any]:
    short, long = [1 + i / 16 for i in range(pairs)], [1.5 + 2.5 * i for i in range(pairs)]
    return {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": short, "long_factor": long, **others}


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3-4k": ("phi3", {"num_key_value_heads": 6, "sliding_window": 17}),
    "phi3-128k": (
        "phi3",
        {"rope_parameters": longrope(4), "original_max_position_embeddings": 32, "sliding_window": 10**5},
    ),
    "phi4-mini": (
        "phi3",
        {
            "rope_parameters": longrope(3, partial_rotary_factor=0.75),
            "original_max_position_embeddings": 32,
            "tie_word_embeddings": True,
        },
    ),
    "glm": ("glm", {"head_dim": 12}),
    "glm4": ("glm4", {"head_dim": 16, "num_key_value_heads": 1}),
    "glm4-yarn": (
        "glm4",
        {"head_dim": 16, "attention_bias": False, "rope_parameters": {**YARN, "partial_rotary_factor": 0.5}},
    ),
    "ministral3": (
        "ministral3",
        {
            "head_dim": 16,
            "rope_parameters": {**YARN, "llama_4_scaling_beta": 0.1, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.125,
            "residual_multiplier": 0.22,
            "logits_scaling": 4.0,
            "tie_word_embeddings": True,
        },
    ),
    "granite-biases": ("granite", {"attention_bias": True, "mlp_bias": True, "attention_multiplier": 0.3}),
    "ernie4_5": ("ernie4_5", {"head_dim": 16}),
    "ernie4_5-biases": ("ernie4_5", {"head_dim": None, "use_bias": True, "tie_word_embeddings": False}),
    "exaone4-1.2b": (
        "exaone4",
        {
            "sliding_window": None,
            "sliding_window_pattern": None,
            "layer_types": ["full_attention"] * 3,
            "tie_word_embeddings": True,
        },
    ),
    "exaone4-32b": (
        "exaone4",
        {
            "num_hidden_layers": 4,
            "sliding_window": 17,
            "sliding_window_pattern": "LLLG",
            "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e6,
                "factor": 16.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3-yarn": ("qwen3", {"head_dim": 16, "rope_parameters": {**YARN, "attention_factor": 0.8}}),
    "llama-yarn": (
        "llama",
        {"rope_parameters": {**YARN, "beta_fast": 8.0, "beta_slow": 2.0, "truncate": False, "mscale": 0.7}},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_equals_transformers(name: str, tmp_path: Path) -> None:
    model_type, settings = MODELS[name]
    assert_same(make_theirs(model_type, **settings), tmp_path, LENGTH)


@pytest.mark.parametrize("name", ["phi3-128k", "phi4-mini"])
def test_longrope_within_the_original_positions(name: str, tmp_path: Path) -> None:
    """Factors are those of the positions that are served, not of the text. Fewer positions, set when memory is known,
    count as well."""
    model_type, settings = MODELS[name]
    theirs = make_theirs(model_type, **settings)
    theirs.save_pretrained(tmp_path)
    tokens = prompt(30)
    with torch.inference_mode():
        short = theirs(torch.tensor([tokens])).logits[0]
    limited = load(tmp_path)
    torch.testing.assert_close(logits_of(load(tmp_path, max_positions=32), tokens), short, rtol=0, atol=1e-4)
    assert (logits_of(limited, tokens) - short).abs().max() > 0.01
    limited.limit_positions(33)
    assert (logits_of(limited, tokens) - short).abs().max() > 0.01
    limited.limit_positions(32)
    torch.testing.assert_close(logits_of(limited, tokens), short, rtol=0, atol=1e-4)
    (warning,) = read_config(tmp_path).warnings
    assert re.search("longrope: texts of up to 32 tokens .* at most 32; transformers decides by the text", warning)


@pytest.mark.parametrize("name", ["phi4-mini", "glm4-yarn", "ministral3", "ernie4_5"])
def test_compiled_kernels(name: str, tmp_path: Path) -> None:
    """They rotate the order of elements that models.parts.rotary makes."""
    model_type, settings = MODELS[name]
    if name == "phi4-mini":
        settings = {**settings, "rope_parameters": longrope(6, partial_rotary_factor=0.75)}
    make_theirs(model_type, **settings, hidden_size=96).save_pretrained(tmp_path)
    tokens = prompt(LENGTH)
    found = logits_of(load(tmp_path, ops=compiled()), tokens)
    torch.testing.assert_close(found, logits_of(load(tmp_path), tokens), rtol=0, atol=1e-4)


def test_relative_positions_need_rotations_without_a_factor() -> None:
    """`DecoderModel.rotary` turns queries that were rotated before."""
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1}
    config = parse_config({"model_type": "llama", **SIZES, **heads, "rope_scaling": YARN})
    model = random_model(config, 0, torch.float32, CPU, Group.single())
    rotary = model.rotary
    assert rotary is not None
    cos, sin = rotary
    assert cos.shape == (128, 8)
    torch.testing.assert_close(cos**2 + sin**2, torch.ones(128, 8))


def test_ministral_of_absent_parameters() -> None:
    stated = {"model_type": "ministral3", **SIZES, "max_position_embeddings": 262144}
    theirs = make_theirs("ministral3", max_position_embeddings=262144).config
    parameters = theirs.to_dict()["rope_parameters"]
    assert parameters["llama_4_scaling_beta"] == 0.1
    assert parse_config(stated) == parse_config({**stated, "rope_parameters": parameters})


@pytest.mark.parametrize(
    ("changes", "sliding", "unrotated"),
    [
        ({"sliding_window_pattern": 4}, (0, 1, 2, 4, 5), (3,)),
        ({}, (0, 1, 2, 4, 5), (3,)),
        ({"sliding_window_pattern": "LG"}, (0, 2, 4), (1, 3, 5)),
        ({"sliding_window_pattern": "L"}, (0, 1, 2, 3, 4), (5,)),
        ({"sliding_window_pattern": None}, (), (0, 1, 2, 3, 4, 5)),
        ({"sliding_window": 256}, (), (3,)),
        ({"sliding_window": None}, (), ()),
        ({"sliding_window": None, "layer_types": ["full_attention"] * 6}, (), ()),
        ({"layer_types": ["full_attention", "sliding_attention"] * 3}, (1, 3, 5), (0, 2, 4)),
    ],
)
def test_layers_of_exaone(changes: dict[str, Any], sliding: tuple[int, ...], unrotated: tuple[int, ...]) -> None:
    """A window that hides nothing decides which layers rotate all the same."""
    data = {"model_type": "exaone4", **SIZES, "num_hidden_layers": 6, "num_attention_heads": 3, "sliding_window": 16}
    config = parse_config({**data, "num_key_value_heads": 3, **changes})
    assert (config.sliding_layers, config.unrotated_layers) == (sliding, unrotated)


def test_what_is_missing() -> None:
    with pytest.raises(ModelError, match="'hunyuan_v1_dense' is not supported: it needs norms of queries and keys aft"):
        parse_config({"model_type": "hunyuan_v1_dense", **SIZES})
    with pytest.raises(ModelError, match="sliding_window_pattern 'LX'"):
        parse_config({"model_type": "exaone4", **SIZES, "num_hidden_layers": 2, "sliding_window_pattern": "LX"})
