"""Gemma 3, OLMo, SmolLM3 and decoders whose layers slide, against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

from models.architectures import ARCHITECTURES, MISSING
from models.config import ModelError, RopeConfig, parse_config, read_config
from models.files.nested_text import WRAPPERS
from tests.support.oracle_models import SIZES, check_served, write_checkpoint
from tests.support.rig import compiled

WINDOW = 20
GEMMA = {"num_hidden_layers": 7, "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": WINDOW}
NEW_KEYS = ("rope_parameters", "layer_types")
LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 8.0, "attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0}


def sliding_types(*full: int, count: int = 4) -> list[str]:
    return ["full_attention" if layer in full else "sliding_attention" for layer in range(count)]


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    # model type, settings of its config, what config.json has instead of the keys that transformers 5 writes
    "gemma3": ("gemma3_text", GEMMA, {}),
    "gemma3-old-keys": (
        "gemma3_text",
        GEMMA,
        {"rope_theta": 50000.0, "rope_local_base_freq": 400.0, "rope_scaling": LINEAR, "sliding_window_pattern": 3},
    ),
    "gemma3-old-keys-plain": ("gemma3_text", GEMMA, {"rope_theta": 1e6, "rope_scaling": None, "sliding_window": 33}),
    "gemma3-new-keys": (
        "gemma3_text",
        {**GEMMA, "num_hidden_layers": 3, "layer_types": sliding_types(1, count=3)}
        | {"num_key_value_heads": 1, "head_dim": 32, "attention_bias": True}
        | {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
                "full_attention": {"rope_theta": 70000.0, **LINEAR},
            }
        },
        {},
    ),
    "gemma3-untied": ("gemma3_text", {**GEMMA, "num_key_value_heads": 4, "tie_word_embeddings": False}, {}),
    "gemma3-window-beyond-positions": ("gemma3_text", {**GEMMA, "sliding_window": 300}, {}),
    "gemma3-all-slide": ("gemma3_text", {**GEMMA, "layer_types": sliding_types(count=7)}, {}),
    "olmo2": ("olmo2", {"num_key_value_heads": 4}, {}),
    "olmo2-grouped-tied": ("olmo2", {"tie_word_embeddings": True, "attention_bias": True}, {"rope_theta": 500000.0}),
    "olmo3": ("olmo3", {"sliding_window": WINDOW, "num_hidden_layers": 5}, {}),
    "olmo3-old-keys": ("olmo3", {"sliding_window": WINDOW}, {"rope_theta": 500000.0, "rope_scaling": LINEAR}),
    "olmo3-published": (
        "olmo3",
        {"sliding_window": WINDOW, "num_hidden_layers": 8, "num_key_value_heads": 4, "hidden_size": 64},
        {
            "rope_theta": 500000,
            "rope_scaling": YARN | {"original_max_position_embeddings": 32},
            "layer_types": sliding_types(3, 7, count=8),
        },
    ),
    "olmo3-layer-types": (
        "olmo3",
        {"sliding_window": WINDOW, "num_key_value_heads": 1, "layer_types": sliding_types(0, 3)},
        {},
    ),
    "smollm3": ("smollm3", {"num_hidden_layers": 5, "hidden_size": 64}, {}),
    "smollm3-interval": ("smollm3", {"no_rope_layer_interval": 2, "tie_word_embeddings": False}, {"rope_theta": 777.0}),
    "smollm3-list": ("smollm3", {"no_rope_layers": [0, 1, 1, 0, 1], "num_key_value_heads": 1}, {}),
    "smollm3-sliding": (
        "smollm3",
        {"use_sliding_window": True, "sliding_window": WINDOW, "no_rope_layer_interval": 2, "attention_bias": True}
        | {"mlp_bias": True},
        {},
    ),
    "mistral": ("mistral", {"sliding_window": WINDOW, "head_dim": 16}, {}),
    "mistral-old-keys": ("mistral", {"sliding_window": WINDOW}, {"rope_theta": 1e6}),
    "ministral": ("ministral", {"sliding_window": WINDOW, "layer_types": sliding_types(0, 3), "head_dim": 16}, {}),
    "ministral-all-slide": ("ministral", {"sliding_window": WINDOW, "head_dim": 16}, {}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}, {}),
    "qwen2-old-keys": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
        {"rope_theta": 1e6},
    ),
    "qwen2-not-used": ("qwen2", {"use_sliding_window": False, "sliding_window": WINDOW, "max_window_layers": 2}, {}),
    "qwen3": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 3, "head_dim": 16},
        {},
    ),
}


def write(name: str, directory: Path) -> Any:
    model_type, settings, old = CASES[name]
    config = transformers.AutoConfig.for_model(model_type, **SIZES | settings)
    return write_checkpoint(directory, config, changes=old, without=NEW_KEYS if old else ())


@pytest.mark.parametrize("name", CASES)
def test_equals_transformers(name: str, tmp_path: Path) -> None:
    """In float32, on prompts beyond the window."""
    check_served(tmp_path, write(name, tmp_path))


@pytest.mark.parametrize(
    "name", ["gemma3-old-keys", "gemma3-new-keys", "olmo3-published", "smollm3", "mistral", "ministral-all-slide"]
)
def test_equals_transformers_on_cpu_kernels(name: str, tmp_path: Path) -> None:
    theirs = write(name, tmp_path)
    assert read_config(tmp_path).head_dim % 16 == 0, "plain torch attends with such heads"
    check_served(tmp_path, theirs, ops=compiled())


GEMMA_3_1B: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}


def test_gemma_3_1b() -> None:
    """As published, and with the keys of transformers 5."""
    config = parse_config(GEMMA_3_1B)
    assert config.max_model_len == 32768
    assert config.attention_groups[0] == (5, 11, 17, 23)
    assert (config.sliding_window, len(config.sliding_layers)) == (512, 22)
    assert (config.rope_of(5), config.rope_of(6)) == (RopeConfig(theta=1e6), RopeConfig(theta=1e4))
    assert config.tie_word_embeddings
    assert config.attention_scale == 1 / 16
    new = {key: value for key, value in GEMMA_3_1B.items() if not key.startswith(("rope_", "sliding_window_"))}
    new["layer_types"] = sliding_types(5, 11, 17, 23, count=26)
    new["rope_parameters"] = {
        "full_attention": {"rope_type": "default", "rope_theta": 1000000},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000},
    }
    assert parse_config(new) == config


def test_olmo_3_scales_full_layers_only() -> None:
    keys = {"model_type": "olmo3", "max_position_embeddings": 65536, "rope_theta": 500000, "sliding_window": 4096}
    config = parse_config(SIZES | keys | {"num_hidden_layers": 8, "rope_scaling": LINEAR})
    assert (config.rope.kind, config.rope_of(3)) == ("linear", config.rope)
    assert config.rope_of(0) == RopeConfig(theta=500000.0)
    assert config.sliding_layers == (0, 1, 2, 4, 5, 6)
    plain = parse_config(SIZES | keys)
    assert plain.sliding_rope is None


def test_smollm3_3b() -> None:
    keys = {"model_type": "smollm3", "num_hidden_layers": 36, "max_position_embeddings": 65536, "rope_theta": 5e6}
    lists = {"no_rope_layers": ([1, 1, 1, 0] * 9), "no_rope_layer_interval": 4, "layer_types": ["full_attention"] * 36}
    config = parse_config(SIZES | keys | lists | {"use_sliding_window": False, "sliding_window": None})
    assert config == parse_config(SIZES | keys)
    assert config.unrotated_layers == tuple(range(3, 36, 4))
    assert config.rope_of(3) is None
    assert config.sliding_window is None


@pytest.mark.parametrize("model_type", ["gemma3_text", "olmo2", "olmo3", "smollm3", "ministral"])
def test_absent_keys_have_the_defaults_of_transformers(model_type: str, tmp_path: Path) -> None:
    theirs = transformers.AutoConfig.for_model(model_type)
    theirs.save_pretrained(tmp_path)
    written = read_config(tmp_path)
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    absent = parse_config({"model_type": model_type} | {key: getattr(theirs, key) for key in sizes})
    for ours in (written, absent):
        assert ours.num_kv_heads == theirs.num_key_value_heads
        assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
        assert ours.rms_norm_eps == theirs.rms_norm_eps
        assert ours.max_position_embeddings == theirs.max_position_embeddings
        assert ours.tie_word_embeddings == theirs.tie_word_embeddings
        kinds = getattr(theirs, "layer_types", ["full_attention"] * theirs.num_hidden_layers)
        hidden = theirs.max_position_embeddings <= (theirs.to_dict().get("sliding_window") or 10**9)
        expected = [layer for layer, kind in enumerate(kinds) if kind == "sliding_attention"]
        assert list(ours.sliding_layers) == ([] if hidden else expected)
        rope = theirs.rope_parameters
        assert ours.rope.theta == rope.get("full_attention", rope)["rope_theta"]
        if ours.sliding_rope:
            assert ours.sliding_rope.theta == rope["sliding_attention"]["rope_theta"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping 30"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        ({"hidden_activation": "gelu"}, "hidden_activation 'gelu' .* only gelu_pytorch_tanh"),
        ({"sliding_window": None}, "sliding_window None"),
        ({"sliding_window_pattern": 0}, "sliding_window_pattern 0"),
        ({"query_pre_attn_scalar": -1}, "query_pre_attn_scalar -1"),
        ({"rope_local_base_freq": "low"}, "rope_local_base_freq 'low'"),
        ({"model_type": "gemma2"}, "model_type 'gemma2' is not supported: it needs logit softcapping"),
        ({"model_type": "smollm3", "architectures": [], "no_rope_layers": [1]}, "no_rope_layers has 1 entries"),
        ({"model_type": "smollm3", "architectures": [], "no_rope_layers": [2] * 26}, "no_rope_layers is not a list"),
    ],
)
def test_refused(changes: dict[str, Any], message: str) -> None:
    gemma = changes.get("model_type", "gemma3_text") == "gemma3_text"
    foreign = () if gemma else ("query_pre_attn_scalar", "hidden_activation")
    with pytest.raises(ModelError, match=message):
        parse_config({key: value for key, value in (GEMMA_3_1B | changes).items() if key not in foreign})


def test_missing_architectures_are_not_served() -> None:
    assert not MISSING.keys() & (ARCHITECTURES.keys() | WRAPPERS.keys())
