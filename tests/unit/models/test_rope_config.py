"""Keys of config.json about rotary position embedding, in all spellings."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers

from models.config import ModelError, RopeConfig, parse_config
from models.files.rope_config import has_own_rope, parse_rope
from models.parts.rotary import make_rotary
from tests.support.configs import llama, without

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
YARN_CONFIG = RopeConfig(theta=5e5, kind="yarn", factor=4.0, original_max_positions=512)
FACTORS = {"short_factor": [1.0, 2], "long_factor": [3.0, 4.5]}
LONGROPE = {"rope_type": "longrope", **FACTORS, "original_max_position_embeddings": 512}
LONGROPE_CONFIG = RopeConfig(
    theta=5e5,
    kind="longrope",
    factor=4.0,
    original_max_positions=512,
    attention_factor=math.sqrt(1 + math.log(4) / math.log(512)),
    short_factors=(1.0, 2.0),
    long_factors=(3.0, 4.5),
)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rope_scaling": YARN}, YARN_CONFIG),
        ({"rope_parameters": {**YARN, "rope_theta": 7.0}}, replace(YARN_CONFIG, theta=7.0)),
        ({"rope_scaling": {**without(YARN, "rope_type"), "type": "yarn"}}, YARN_CONFIG),
        ({"rope_scaling": without(YARN, "factor")}, YARN_CONFIG),  # 2048 / 512
        (
            {"rope_scaling": YARN, "original_max_position_embeddings": 64},
            replace(YARN_CONFIG, original_max_positions=64),
        ),
        (
            {"rope_scaling": without(YARN, "original_max_position_embeddings")},
            replace(YARN_CONFIG, original_max_positions=2048),
        ),
        (
            {"rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 0, "truncate": False, "beta_fast": None}},
            replace(YARN_CONFIG, mscale=0.7, truncate=False),
        ),
        (
            {"rope_scaling": {**YARN, "attention_factor": 1.5, "beta_fast": 8, "beta_slow": 2}},
            replace(YARN_CONFIG, attention_factor=1.5, beta_fast=8.0, beta_slow=2.0),
        ),
        ({"rope_scaling": {**YARN, "llama_4_scaling_beta": 0.1}}, replace(YARN_CONFIG, query_beta=0.1)),
        ({"rope_scaling": LONGROPE}, LONGROPE_CONFIG),
        ({"rope_scaling": {**FACTORS, "type": "su"}, "original_max_position_embeddings": 512}, LONGROPE_CONFIG),
        ({"rope_scaling": {**LONGROPE, "rope_type": "yarn"}}, LONGROPE_CONFIG),
        ({"rope_scaling": {**LONGROPE, "factor": 1.0}}, replace(LONGROPE_CONFIG, factor=1.0, attention_factor=1.0)),
        ({"rope_scaling": {**LONGROPE, "attention_factor": 1.25}}, replace(LONGROPE_CONFIG, attention_factor=1.25)),
        ({"partial_rotary_factor": 0.5}, RopeConfig(theta=5e5, rotated=0.5)),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.25}, "partial_rotary_factor": 0.5},
            RopeConfig(theta=5e5, rotated=0.25),
        ),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]}}, RopeConfig(theta=5e5)),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 64}},
            RopeConfig(theta=5e5, kind="dynamic", factor=2.0, original_max_positions=2048),
        ),
    ],
)
def test_spellings(changes: dict[str, Any], expected: RopeConfig) -> None:
    assert parse_rope({"rope_theta": 5e5, **changes}, 2048) == expected


def test_parameters_by_layer_type() -> None:
    full, sliding = {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0}, {"partial_rotary_factor": 0.5}
    data = {"rope_theta": 3.0, "rope_parameters": {"full_attention": full, "sliding_attention": sliding}}
    linear = RopeConfig(theta=1e6, kind="linear", factor=8.0)
    assert parse_rope(data, 2048) == parse_rope(data, 2048, "full_attention") == linear
    assert parse_rope(data, 2048, "sliding_attention") == RopeConfig(theta=3.0, rotated=0.5)
    assert has_own_rope(data, "sliding_attention")
    one = {"rope_parameters": {"full_attention": full}}
    assert parse_rope(one, 2048, "sliding_attention") == RopeConfig()
    assert not has_own_rope(one, "sliding_attention")
    old = {"rope_scaling": {"type": "linear", "factor": 8.0}, "rope_theta": 1e6}
    assert parse_rope(old, 2048) == parse_rope(old, 2048, "sliding_attention") == linear


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({**YARN, "factor": 0}, "factor 0"),
        ({**YARN, "original_max_position_embeddings": "x"}, "original_max_position_embeddings 'x'"),
        ({**YARN, "beta_fast": 1.0, "beta_slow": 2.0}, "beta_fast"),
        ({**YARN, "beta_slow": 1e-310}, "beta_slow 1e-310 is not a number from 1e-09 to 1e\\+09"),
        ({**YARN, "beta_fast": 1e308}, "beta_fast 1e\\+308"),
        ({**YARN, "rope_theta": 1.0}, "rope_theta 1"),
        ({**YARN, "truncate": "no"}, "truncate 'no'"),
        ({**LONGROPE, "long_factor": None}, "long_factor None"),
        ({**LONGROPE, "short_factor": [1.0, "x"]}, "short_factor 'x'"),
        ({**LONGROPE, "short_mscale": 1.2}, "short_mscale 1.2"),
        ({**LONGROPE, "original_max_position_embeddings": 1}, "original_max_position_embeddings 1"),
        (LONGROPE, "short_factor has 2 factors for 64 pairs"),
        ({"rope_type": "dynamic"}, "factor"),
        ({"rope_type": "dynamic", "factor": 2.0, "partial_rotary_factor": 2 / 128}, "there is only one"),
        ({**LONGROPE, "short_factor": [1.0] * 64}, "long_factor has 2 factors for 64 pairs"),
        ({"rope_type": "proportional"}, "rope_type 'proportional' is not supported; these are: default, linear"),
        ({"full_attention": {}, "rope_theta": 3.0}, "rope_scaling .* is not supported; expected parameters of all"),
    ],
)
def test_refusals(rope: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        parse_config(llama(rope_scaling=rope))


@pytest.mark.parametrize(
    ("changes", "longest", "warning"),
    [
        ({"rope_scaling": YARN}, 2048, None),
        ({"rope_scaling": {**YARN, "factor": 2.5}}, 1280, None),
        ({"rope_scaling": YARN, "original_max_position_embeddings": 256}, 1024, None),
        ({"rope_scaling": without(YARN, "factor")}, 600, None),
        ({"rope_scaling": without(YARN, "original_max_position_embeddings")}, 600, None),
        ({"rope_scaling": {**LONGROPE, **{name: [1.0] * 64 for name in FACTORS}}}, 600, "texts of up to 512 tokens"),
    ],
)
def test_longest_request(changes: dict[str, Any], longest: int, warning: str | None) -> None:
    """YaRN serves what it extends the original positions to, as Qwen's files mean it, which state the original ones
    as max_position_embeddings."""
    config = parse_config(llama(max_position_embeddings=600, **changes))
    assert config.max_model_len == longest
    assert len(config.warnings) == (warning is not None)
    assert re.search(warning or "", " ".join(config.warnings))


def test_longrope_of_no_more_positions_needs_no_warning() -> None:
    rope = {**LONGROPE, **{name: [1.0] * 64 for name in FACTORS}}
    assert parse_config(llama(max_position_embeddings=512, rope_scaling=rope)).warnings == ()


def test_longrope_of_phi3_without_original_positions() -> None:
    """The default of the architecture counts more than a number among the parameters, as in transformers."""
    data: dict[str, Any] = {"model_type": "phi3", "vocab_size": 99, "hidden_size": 64, "intermediate_size": 64}
    data |= {"num_attention_heads": 16, "num_hidden_layers": 2, "max_position_embeddings": 131072, "pad_token_id": 0}
    key = "original_max_position_embeddings"
    for rope in (without(LONGROPE, key), LONGROPE):
        theirs: Any = transformers.Phi3Config(**data | {"rope_scaling": dict(rope)}).rope_parameters
        ours = parse_config(data | {"rope_scaling": rope}).rope
        assert (ours.original_max_positions, ours.factor) == (theirs[key], 131072 / theirs[key]) == (4096, 32.0)
    stated = parse_config(data | {"rope_scaling": LONGROPE, key: 8192})
    assert stated.rope.original_max_positions == 8192


@pytest.mark.parametrize("betas", [{"beta_fast": 1e9, "beta_slow": 1e-9}, {"beta_slow": 1e-9}, {"beta_fast": 1e9}])
def test_yarn_at_the_bounds_is_finite(betas: dict[str, float]) -> None:
    rope = parse_rope({"rope_scaling": {**YARN, **betas}, "rope_theta": 1.0000001}, 2048)
    make_rotary(rope, 16, 64, dtype=torch.float32, device=torch.device("cpu"))


@pytest.mark.parametrize(
    "rope",
    [
        RopeConfig(theta=5e-324),
        RopeConfig(kind="yarn", factor=4.0, attention_factor=1e308),
        RopeConfig(kind="llama3", factor=1e-300),
    ],
)
def test_tables_are_finite(rope: RopeConfig) -> None:
    with pytest.raises(ModelError, match="rotary embedding is not finite"):
        make_rotary(rope, 16, 64, dtype=torch.float32, device=torch.device("cpu"))
