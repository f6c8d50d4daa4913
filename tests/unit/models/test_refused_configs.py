"""Models that are not served, and broken files: the error names the key."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from models.config import ModelError, parse_config, read_config
from tests.support.configs import LLAMA, llama, of_type, without


@pytest.mark.parametrize(
    ("key", "neutral", "other"),
    [
        ("attn_logit_softcapping", None, 50.0),
        ("final_logit_softcapping", 0, 30.0),
        ("logits_scaling", 1.0, 8.0),
        ("residual_multiplier", 1.0, 0.22),
        ("embedding_multiplier", 1, 12),
        ("attention_multiplier", None, 0.0078),
        ("scale_emb", 1, 12),
        ("scale_depth", None, 1.4),
        ("attention_sinks", False, True),
        ("use_qk_norm", False, True),
        ("no_rope_layers", [1, 1], [0, 1]),
        ("clip_qkv", None, 8.0),
        ("parallel_attn", False, True),
        ("alibi", False, True),
        ("rope_interleaved", False, True),
        ("use_logn_attn", False, True),
        ("hidden_activation", "silu", "gelu_pytorch_tanh"),
        ("rope_condense_ratio", 1, 4),
        ("is_causal", True, False),
        ("use_bidirectional_attention", False, True),
        ("num_key_value_heads_per_layer", None, [4, 2]),
        ("layer_types", ["full_attention"] * 32, ["chunked_attention"] * 32),
    ],
)
def test_keys_of_other_models(key: str, neutral: Any, other: Any) -> None:
    assert parse_config(llama(**{key: neutral})) == parse_config(LLAMA)
    with pytest.raises(ModelError, match=key):
        parse_config(llama(**{key: other}))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (llama(model_type="blt"), "model_type 'blt' is not supported; these are: llama, "),
        (llama(model_type="deepseek_v3"), "'deepseek_v3' is not supported: it needs multi-head latent attention"),
        (without(LLAMA, "model_type"), "model_type None"),
        (llama(architectures=["LlamaForSequenceClassification"]), "LlamaForSequenceClassification"),
        (llama(num_local_experts=8), "num_local_experts 8"),
        (llama(hidden_act="gelu"), "hidden_act 'gelu'"),
        (llama(rope_scaling={"rope_type": "llama4", "factor": 4.0}), "rope_scaling: rope_type 'llama4'"),
        (llama(rope_condense_ratio=10**400), "rope_condense_ratio 1"),
        (llama(no_rope_layers=[1, 0]), r"no_rope_layers \[1, 0\]"),
        (llama(layer_types=["linear_attention"] * 32), "layer_types"),
        (llama(layer_types=["full_attention"] * 31), "layer_types has 31 entries for 32 layers"),
        (of_type("qwen2", layer_types=["full_attention"] * 33), "layer_types has 33 entries"),
        (llama(layer_types=["sliding_attention"] * 32), "sliding_window None"),
        (of_type("qwen3", layer_types=["sliding_attention"] * 32, sliding_window=None), "sliding_window None"),
        (llama(architectures=["LlamaForCausalLM"] * 2), "architectures"),
        (llama(hidden_activation="gelu"), "hidden_activation 'gelu'"),
        (llama(dual_chunk_attention_config={"chunk_size": 8, "local_size": 8}), "chunk_size must be more"),
        (llama(rope_scaling={"type": "linear"}), "factor None"),
        (llama(rope_scaling={"type": "linear", "factor": 0}), "factor 0"),
        (llama(rope_scaling={**LLAMA["rope_scaling"], "low_freq_factor": 4.0}), "low_freq_factor"),
        (llama(rope_scaling="linear"), "rope_scaling 'linear'"),
        (llama(rope_scaling={"type": "linear", "factor": 1e308}), "factor 1e\\+308 is too large"),
        (llama(rope_scaling={"type": "linear", "factor": 1e-6}), "factor 1e-06 is too small"),
        (
            llama(model_type="smollm3", architectures=None, no_rope_layers=[1] * 6),
            "no_rope_layers has 6 entries for 32 layers",
        ),
        (
            llama(model_type="mixtral", architectures=None, num_experts=3, num_local_experts=4),
            "num_experts and num_local_experts contradict",
        ),
        ({"model_type": "gemma3", "text_config": {"model_type": ["x"]}}, "model_type \\['x'\\]"),
        (llama(rope_scaling=None, rope_parameters={"chunked_attention": {"rope_theta": 1.0}}), "chunked_attention"),
        (llama(partial_rotary_factor=1.5), "partial_rotary_factor 1.5"),
        (llama(partial_rotary_factor=0.01), r"head_dim \(128\) times partial_rotary_factor \(0.01\) makes 1"),
        (llama(partial_rotary_factor=0.04), r"head_dim \(128\) times partial_rotary_factor \(0.04\) makes 5"),
        (llama(rope_scaling=None, rope_parameters={"full_attention": {"a": {}}}), "rope_parameters {'a'"),
        (llama(rope_scaling=None, rope_parameters={"chunked_attention": {}}), "chunked_attention"),
        (llama(rope_theta="big"), "rope_theta 'big'"),
        (without(LLAMA, "vocab_size"), "vocab_size None"),
        (llama(num_hidden_layers=0), "num_hidden_layers 0"),
        (llama(num_hidden_layers=2 * 10**9), "num_hidden_layers 2000000000 is not an integer from 1 to 10000"),
        (llama(model_type="mixtral", architectures=None, num_local_experts=10**9), "num_local_experts 1000000000"),
        (llama(hidden_size=4096.5), "hidden_size 4096.5"),
        (llama(num_attention_heads=True), "num_attention_heads True"),
        (llama(num_key_value_heads=5), "num_key_value_heads"),
        (llama(num_attention_heads=24), "hidden_size"),
        (llama(head_dim=63), "head_dim"),
        (llama(tie_word_embeddings="yes"), "tie_word_embeddings 'yes'"),
        (llama(rms_norm_eps=-1), "rms_norm_eps -1"),
        (llama(eos_token_id="</s>"), "eos_token_id '</s>'"),
        (llama(eos_token_id=[1, None]), "eos_token_id"),
        (llama(bos_token_id=-2), "bos_token_id -2"),
        (of_type("qwen2", use_sliding_window=True, layer_types=["chunked_attention"]), "layer_types"),
    ],
)
def test_refusals_name_the_key(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        parse_config(data)


@pytest.mark.parametrize(("positions", "ratio", "says"), [(16384, 8, ("8", 2048)), (16384, 2.5, ("2.5", 6553))])
def test_positions_that_are_scaled_already(positions: int, ratio: float, says: tuple[str, int]) -> None:
    """The remedy serves as many positions as the file states."""
    remedy = f'"rope_scaling": {{"rope_type": "linear", "factor": {says[0]}}} with "max_position_embeddings": {says[1]}'
    with pytest.raises(ModelError, match=re.escape(f"is not supported; write it as {remedy}")):
        parse_config(llama(rope_condense_ratio=ratio, max_position_embeddings=positions))
    rope = {"rope_type": "linear", "factor": ratio}
    assert positions - ratio < parse_config(llama(rope_scaling=rope, max_position_embeddings=says[1])).max_model_len
    assert parse_config(llama(rope_scaling=rope, max_position_embeddings=says[1])).max_model_len <= positions


ENDLESS = [0] * 10**4


@pytest.mark.parametrize("value", [float("inf"), 10**400, 10**30, "x" * 10**4, ENDLESS, {"a": ENDLESS}])
@pytest.mark.parametrize(
    ("key", "nested"),
    [
        *((key, False) for key in ("max_position_embeddings", "vocab_size", "rms_norm_eps", "rope_theta", "head_dim")),
        *((key, False) for key in ("tie_word_embeddings", "model_type", "architectures", "bos_token_id", "hidden_act")),
        *((key, True) for key in ("factor", "rope_type", "rope_theta", "original_max_position_embeddings")),
    ],
)
def test_huge_values(key: str, nested: bool, value: Any) -> None:
    """They are refused, if at all, by a message of one line."""
    rope = {"rope_type": "linear", "factor": 2.0, key: value}
    try:
        parse_config(llama(rope_scaling=rope) if nested else llama(**{key: value}))
    except ModelError as error:
        says = str(error)
        assert key in says or "rope" in says
        assert len(says) < 400
        assert "\n" not in says
    else:
        assert key in ("rope_theta", "rms_norm_eps")
        assert value == 10**30


def test_nesting_too_deep(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"a":' * 10**5)
    with pytest.raises(ModelError, match=r"config\.json: maximum recursion depth"):
        read_config(tmp_path)


def test_an_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")

    def refuse(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(ModelError, match=r"config\.json: .*Permission denied"):
        read_config(tmp_path)


def test_broken_files(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere: no such model directory"):
        read_config(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"config\.json: not found"):
        read_config(tmp_path)
    path = tmp_path / "config.json"
    for content in ("{", "[]", "\udcff"):
        path.write_bytes(content.encode("utf-8", "surrogateescape"))
        with pytest.raises(ModelError, match=r"config\.json: "):
            read_config(tmp_path)
    path.write_text(json.dumps(llama(hidden_act="gelu")))
    with pytest.raises(ModelError, match=r"config\.json: hidden_act"):
        read_config(tmp_path)
    path.write_text(json.dumps(LLAMA))
    (tmp_path / "generation_config.json").write_text("nonsense")
    with pytest.raises(ModelError, match=r"generation_config\.json: "):
        read_config(tmp_path)
