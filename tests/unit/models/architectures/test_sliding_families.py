"""Configs of Gemma 3, OLMo, SmolLM3 and Ministral: those published, absent keys, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

from models.architectures import ARCHITECTURES, MISSING
from models.config import ModelError, RopeConfig, parse_config, read_config
from models.files.nested_text import WRAPPERS
from tests.support.oracle_models import SIZES

LINEAR = {"rope_type": "linear", "factor": 4.0}


def sliding_types(*full: int, count: int = 4) -> list[str]:
    return ["full_attention" if layer in full else "sliding_attention" for layer in range(count)]


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
