from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers

from models.config import ModelConfig, RopeConfig, parse_config, read_config
from tests.support.configs import LLAMA, llama, of_type, without
from tests.support.paths import ROOT


def test_llama_3_1() -> None:
    assert parse_config(LLAMA) == ModelConfig(
        model_type="llama",
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope=RopeConfig(
            theta=500000.0,
            kind="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_positions=8192,
        ),
        bos_token_id=128000,
        eos_token_ids=(128001, 128008, 128009),
    )
    assert parse_config(LLAMA).max_model_len == 131072


def test_llama_2_and_its_kin() -> None:
    """Old config files: no head_dim, no KV heads, no rope keys, one EOS token."""
    config = parse_config(without(llama(eos_token_id=2), "num_key_value_heads", "rope_theta", "rope_scaling"))
    assert (config.num_kv_heads, config.head_dim) == (32, 128)
    assert config.rope == RopeConfig(theta=10000.0)
    assert config.eos_token_ids == (2,)
    tied = parse_config(llama(tie_word_embeddings=True, attention_bias=True, mlp_bias=True))
    assert tied.tie_word_embeddings
    assert (tied.qkv_bias, tied.o_bias, tied.mlp_bias) == (True, True, True)


def test_mistral() -> None:
    config = parse_config(of_type("mistral", sliding_window=None, head_dim=64, attention_bias=True))
    assert (config.head_dim, config.qkv_bias, config.o_bias, config.qk_norm) == (64, False, False, "none")
    assert config.sliding_window is None
    assert config.max_model_len == 131072
    for keys in ({"sliding_window": 4096}, {}):  # the family's default
        slides = parse_config(of_type("mistral", **keys))
        assert (slides.max_model_len, slides.sliding_window) == (131072, 4096)
        assert slides.sliding_layers == tuple(range(32))
        assert (slides.attention_groups, slides.windows) == (((), tuple(range(32))), (0, 4096))
        kept = replace(slides, keeps_all_kv=True)
        assert (kept.attention_groups, kept.windows) == ((tuple(range(32)), ()), (4096, 0))
    wide = parse_config(of_type("mistral", sliding_window=10**6))
    assert (wide.max_model_len, wide.sliding_window, wide.sliding_layers) == (131072, None, ())


def test_qwen2() -> None:
    window = {"sliding_window": 4096, "max_window_layers": 28}
    config = parse_config(of_type("qwen2", use_sliding_window=False, **window))
    assert (config.qkv_bias, config.o_bias, config.qk_norm) == (True, False, "none")
    assert config.sliding_window is None
    slides = parse_config(of_type("qwen2", use_sliding_window=True, **window))
    assert (slides.max_model_len, slides.sliding_window) == (131072, 4096)
    assert slides.sliding_layers == (28, 29, 30, 31)
    assert slides.attention_groups == (tuple(range(28)), (28, 29, 30, 31))
    few = parse_config(of_type("qwen2", use_sliding_window=True, num_hidden_layers=28, **window))
    assert few.sliding_window is None
    layers = {"layer_types": ["full_attention"] * 32}
    assert parse_config(of_type("qwen2", use_sliding_window=True, **window, **layers)).sliding_window is None
    layers = {"layer_types": ["sliding_attention"] + ["full_attention"] * 31}
    assert parse_config(of_type("qwen2", use_sliding_window=True, **window, **layers)).sliding_layers == (0,)


@pytest.mark.parametrize("model_type", ["llama", "seed_oss", "internlm3", "qwen2", "qwen3", "mistral"])
def test_sliding_layers_of_any_family(model_type: str) -> None:
    """layer_types counts before the family's own rule. A window changes no length."""
    data = without(llama(model_type=model_type, sliding_window=1024), "architectures", "rope_scaling")
    layers = ["full_attention"] * 31 + ["sliding_attention"]
    config = parse_config({**data, "layer_types": layers})
    assert (config.max_model_len, config.sliding_window, config.sliding_layers) == (131072, 1024, (31,))
    dense = parse_config({**data, "layer_types": ["full_attention"] * 32})
    assert (dense.max_model_len, dense.sliding_window, dense.sliding_layers) == (131072, None, ())


def test_rotary_embedding_by_type_of_layer() -> None:
    types = {"layer_types": ["full_attention", "sliding_attention"] * 16, "sliding_window": 1024}
    sets = {
        "full_attention": {"rope_type": "linear", "rope_theta": 7.0, "factor": 2.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 5.0},
    }
    config = parse_config(llama(rope_scaling=None, rope_parameters=sets, **types))
    assert config.rope_of(0) == RopeConfig(theta=7.0, kind="linear", factor=2.0)
    assert config.rope_of(1) == RopeConfig(theta=5.0)
    same = sets | {"sliding_attention": sets["full_attention"]}
    assert parse_config(llama(rope_scaling=None, rope_parameters=same, **types)).sliding_rope is None
    # A window that hides nothing tells layers apart, if their rotary embeddings differ.
    wide = parse_config(llama(rope_scaling=None, rope_parameters=sets, **types | {"sliding_window": 10**6}))
    assert wide.rope_of(1) == RopeConfig(theta=5.0)


def test_other_spellings_of_nothing() -> None:
    assert parse_config(llama(architectures=["LLaMAForCausalLM"])) == parse_config(LLAMA)
    assert parse_config(llama(architectures=[])) == parse_config(LLAMA)
    assert parse_config(llama(bos_token_id=-1)) == parse_config(llama(bos_token_id=None))


def test_qwen3() -> None:
    config = parse_config(of_type("qwen3", hidden_size=1024, num_attention_heads=16))
    assert (config.head_dim, config.qk_norm, config.qkv_bias) == (128, "head", False)
    assert parse_config(of_type("qwen3", head_dim=64, attention_bias=True)).o_bias


@pytest.mark.parametrize(
    ("changes", "rope"),
    [
        ({"rope_scaling": None}, RopeConfig(theta=500000.0)),
        ({"rope_scaling": {}}, RopeConfig(theta=500000.0)),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, RopeConfig(theta=500000.0, kind="linear", factor=2.0)),
        (
            {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
            RopeConfig(theta=1e6),
        ),
        (
            {
                "rope_scaling": None,
                "rope_parameters": {"rope_type": "linear", "rope_theta": 7.0, "factor": 3.0},
            },
            RopeConfig(theta=7.0, kind="linear", factor=3.0),
        ),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 32.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                },
                "max_position_embeddings": 4096,
            },
            RopeConfig(theta=500000.0, kind="llama3", factor=32.0, original_max_positions=4096),
        ),
    ],
)
def test_rope_spellings(changes: dict[str, Any], rope: RopeConfig) -> None:
    assert parse_config(llama(**changes)).rope == rope


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "seed_oss", "internlm3"])
def test_reads_what_transformers_writes(model_type: str, tmp_path: Path) -> None:
    """Defaults included: an empty config of each family, saved and read back, has the same values on both sides."""
    theirs = transformers.AutoConfig.for_model(model_type, architectures=architectures_of(model_type))
    theirs.save_pretrained(tmp_path)
    ours = read_config(tmp_path)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert ours.sliding_window == getattr(theirs, "sliding_window", None)
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.max_position_embeddings == theirs.max_position_embeddings


def architectures_of(model_type: str) -> list[str]:
    names = {"seed_oss": "SeedOss", "internlm3": "InternLM3"}
    return [f"{names.get(model_type, model_type.capitalize())}ForCausalLM"]


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "seed_oss", "internlm3"])
def test_absent_keys_have_the_defaults_of_transformers(model_type: str) -> None:
    theirs = transformers.AutoConfig.for_model(model_type, num_attention_heads=32, sliding_window=None)
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    ours = parse_config({"model_type": model_type, "sliding_window": None} | {k: getattr(theirs, k) for k in sizes})
    assert ours.max_model_len == theirs.max_position_embeddings
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]


def test_biases_by_family() -> None:
    def biases(model_type: str, **keys: bool) -> tuple[bool, bool, bool]:
        data = without(llama(model_type=model_type, **keys), "architectures", *({"attention_bias"} - {*keys}))
        config = parse_config(data)
        return config.qkv_bias, config.o_bias, config.mlp_bias

    assert biases("seed_oss") == (True, False, False)
    assert biases("seed_oss", attention_bias=False, attention_out_bias=True, mlp_bias=True) == (False, True, True)
    assert biases("internlm3") == (False, False, False)
    assert biases("internlm3", qkv_bias=True) == (True, False, False)
    assert biases("internlm3", bias=True) == (False, True, True)
    assert biases("internlm3", attention_bias=True, mlp_bias=True) == (True, True, True)


@pytest.mark.parametrize(
    ("changes", "longest", "warning"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 2048, None),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.5}}, 1280, None),
        ({"rope_scaling": {"type": "linear", "factor": 4.0, "original_max_position_embeddings": 128}}, 512, None),
        ({"rope_scaling": LLAMA["rope_scaling"]}, 512, None),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, 2048, "rope_type dynamic: all texts .* at most 512;"),
        ({"rope_scaling": {"type": "dynamic", "factor": 1.0}}, 512, None),
        ({"rope_scaling": {"type": "dynamic", "factor": 0.5}}, 512, None),
        ({"dual_chunk_attention_config": {"chunk_size": 400, "local_size": 80}}, 320, "served up to 320 tokens"),
        ({"dual_chunk_attention_config": {"chunk_size": 4000, "local_size": 80}}, 512, None),
        (
            {
                "dual_chunk_attention_config": {
                    "chunk_size": 400,
                    "local_size": 80,
                    "original_max_position_embeddings": 256,
                }
            },
            256,
            "served up to 256 tokens",
        ),
    ],
)
def test_longest_request(changes: dict[str, Any], longest: int, warning: str | None) -> None:
    """Linear and dynamic scaling multiply the positions. Where others change the arithmetic beyond a length, it is the
    limit."""
    config = parse_config(llama(max_position_embeddings=512, **{"rope_scaling": None, **changes}))
    assert config.max_model_len == longest
    assert len(config.warnings) == (warning is not None)
    assert re.search(warning or "", " ".join(config.warnings))


def test_is_free_of_torch() -> None:
    """The server imports this module and must not load torch."""
    code = "import sys, models.config; sys.exit('torch' in sys.modules)"
    root = ROOT
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_null_is_absent() -> None:
    nulls: dict[str, Any] = dict.fromkeys(("rope_theta", "rms_norm_eps", "max_position_embeddings", "head_dim"))
    absent = parse_config(without(llama(rope_scaling=None), *nulls))
    assert parse_config(llama(rope_scaling=None, **nulls)) == absent
    assert absent.rope.theta == 10000.0
    assert absent.max_model_len == 2048
