"""Text models inside models that read images or audio: their files are served as the text model alone."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from models.config import ModelError, RopeConfig, parse_config, read_config
from models.conversion.convert import convert
from models.files.nested_text import WRAPPERS, text_model
from models.loader import load_model
from models.weights import find_tensors
from parallel.group import Group
from tests.support.oracle_models import SIZES, check_served, write_checkpoint
from tests.support.profiles import only_in_all
from tests.support.rig import CPU

EYE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
EYE |= {"image_size": 28, "patch_size": 14}
TEXT = SIZES | {"num_hidden_layers": 3}
MROPE = {"rope_type": "default", "rope_theta": 5000.0, "mrope_section": [2, 2, 2]}
QWEN_EYE = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 48}

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # text_config, other keys
    "gemma3": (
        TEXT | {"head_dim": 16, "sliding_window": 20, "sliding_window_pattern": 2},
        {"vision_config": EYE, "mm_tokens_per_image": 4},
    ),
    "mistral3": (
        TEXT | {"model_type": "mistral", "head_dim": 16, "sliding_window": None},
        {"vision_config": {**EYE, "model_type": "pixtral", "head_dim": 8}, "tie_word_embeddings": False},
    ),
    "llava": (TEXT | {"model_type": "llama"}, {"vision_config": {**EYE, "model_type": "clip_vision_model"}}),
    "internvl": (
        TEXT | {"model_type": "qwen3", "head_dim": 16},
        {"vision_config": {**EYE, "image_size": [28, 28], "patch_size": [14, 14]}},
    ),
    "qwen2_vl": (
        TEXT | {"rope_parameters": MROPE},
        {"vision_config": {"depth": 1, "embed_dim": 16, "hidden_size": 48, "num_heads": 2}},
    ),
    "qwen2_5_vl": (TEXT | {"rope_parameters": MROPE}, {"vision_config": {**QWEN_EYE, "tie_word_embeddings": True}}),
    "qwen3_vl": (
        TEXT | {"head_dim": 16, "rope_parameters": {**MROPE, "mrope_section": [3, 3, 2], "mrope_interleaved": True}},
        {"vision_config": {**QWEN_EYE, "num_position_embeddings": 4, "deepstack_visual_indexes": [0]}},
    ),
    "smolvlm": (TEXT | {"model_type": "llama"}, {"vision_config": EYE}),
    "idefics3": (TEXT | {"model_type": "llama"}, {"vision_config": EYE}),
    "voxtral": (
        TEXT | {"model_type": "llama", "head_dim": 16},
        {"audio_config": {**EYE, "num_mel_bins": 8}, "projector_hidden_act": "gelu"},
    ),
}


def write(model_type: str, directory: Path) -> Any:
    text, others = CASES[model_type]
    special = {"image_token_id": 90, "image_token_index": 90, "video_token_id": 91, "vision_start_token_id": 92}
    special |= {"vision_end_token_id": 93, "boi_token_index": 94, "eoi_token_index": 95, "audio_token_id": 96}
    special |= {"pad_token_id": 0}
    config = transformers.AutoConfig.for_model(model_type, text_config=text, **others, **special)
    return write_checkpoint(directory, config, kind=getattr(transformers, WRAPPERS[model_type].name))


@pytest.mark.parametrize(
    "model_type", [only_in_all(name) if name in ("llava", "idefics3", "qwen2_vl") else name for name in CASES]
)
def test_equals_transformers(model_type: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    theirs = write(model_type, tmp_path)
    with caplog.at_level(logging.WARNING):
        check_served(tmp_path, theirs)
    (says,) = [record.getMessage() for record in caplog.records if record.name == "models.loader"]
    assert (
        says == f"{tmp_path}: model_type {model_type}: only its text model is served; it reads no images and no audio"
    )


def rename(directory: Path, **prefixes: str) -> None:
    """Give the tensors of model.safetensors other names; keys: old beginnings, with __ for a dot."""
    file = directory / "model.safetensors"
    renamed = {}
    for name, tensor in load_file(file).items():
        for old, new in prefixes.items():
            if name.startswith(f"{old.replace('__', '.')}."):
                name = f"{new}.{name[len(old.replace('__', '.')) + 1 :]}"
                break
        renamed[name] = tensor
    save_file(renamed, file)


@pytest.mark.parametrize(
    ("text", "head", "eye"),
    [
        ("model.language_model", "lm_head", "model.vision_tower"),
        ("language_model.model", "language_model.lm_head", "vision_tower"),
        only_in_all("language_model", "lm_head", "visual"),
        ("model", "lm_head", "model.visual"),
    ],
)
def test_names_of_tensors(text: str, head: str, eye: str, tmp_path: Path) -> None:
    """Of all versions of transformers, and of Qwen's own files."""
    theirs = write("mistral3", tmp_path)
    rename(tmp_path, language_model__model=text, language_model__lm_head=head, lm_head=head)
    rename(tmp_path, model__language_model=text, vision_tower=eye, model__vision_tower=eye)
    names = list(load_file(tmp_path / "model.safetensors"))
    assert {f"{text}.layers.0.mlp.up_proj.weight", f"{text}.norm.weight", f"{head}.weight"} <= {*names}
    assert any(name.startswith(f"{eye}.") for name in names)
    check_served(tmp_path, theirs)


def test_tensors_of_the_text_must_all_be_there(tmp_path: Path) -> None:
    write("llava", tmp_path)
    rename(tmp_path, language_model__model__layers="vision_tower.layers", model__language_model__layers="visual.layers")
    with pytest.raises(ModelError, match=r"tensors missing from the weight files: model\.layers\.0"):
        load_model(tmp_path, dtype=torch.float32, device=CPU, group=Group.single(), progress=False)


def test_files_without_text_config(tmp_path: Path) -> None:
    """As Qwen2.5-VL was published: the text model's keys stand among the others."""
    theirs = write("qwen2_5_vl", tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    text = config.pop("text_config")
    for key in ("model_type", "rope_parameters", "layer_types"):
        text.pop(key)
    text |= {"rope_theta": 5000.0, "rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 2]}}
    file.write_text(json.dumps(text | config))
    rename(tmp_path, model__language_model="model", model__visual="visual")
    check_served(tmp_path, theirs)


GEMMA_3_4B: dict[str, Any] = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": 255999,
    "eoi_token_index": 256000,
    "eos_token_id": [1, 106],
    "image_token_index": 262144,
    "initializer_range": 0.02,
    "mm_tokens_per_image": 256,
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
}


def test_absent_keys_have_the_defaults_of_transformers() -> None:
    """The published config.json of Gemma 3 4B says no more of its text model."""
    config = parse_config(GEMMA_3_4B)
    theirs: Any = transformers.Gemma3Config(**GEMMA_3_4B).text_config
    assert config.vocab_size == theirs.vocab_size == 262208
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (8, 4, 256)
    assert (config.num_layers, config.hidden_size, config.intermediate_size) == (34, 2560, 10240)
    assert config.max_model_len == theirs.max_position_embeddings == 131072
    full = [layer for layer in range(34) if layer not in config.sliding_layers]
    assert full == [layer for layer, kind in enumerate(theirs.layer_types) if kind == "full_attention"]
    assert config.rope.factor == 8.0
    assert config.rope_of(0) != config.rope
    assert config.tie_word_embeddings
    assert config.eos_token_ids == (1, 106)
    for model_type in ("llama", "mistral"):
        nested = {"model_type": "llava", "text_config": {"model_type": model_type}}
        default = transformers.AutoConfig.for_model(model_type)
        ours = parse_config(nested)
        sizes = (default.vocab_size, default.hidden_size, default.intermediate_size, default.num_hidden_layers)
        assert (ours.vocab_size, ours.hidden_size, ours.intermediate_size, ours.num_layers) == sizes
        assert ours.num_heads == default.num_attention_heads


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "voxtral", "internvl"])
@pytest.mark.parametrize("keys", [{}, {"num_key_value_heads": None, "rope_parameters": {"rope_type": "default"}}])
def test_absent_keys_have_the_defaults_of_the_wrapper(model_type: str, keys: dict[str, Any]) -> None:
    theirs: Any = transformers.AutoConfig.for_model(model_type, text_config=dict(keys)).text_config
    ours = parse_config({"model_type": model_type, "text_config": keys})
    assert (ours.vocab_size, ours.hidden_size) == (theirs.vocab_size, theirs.hidden_size)
    assert (ours.intermediate_size, ours.num_layers) == (theirs.intermediate_size, theirs.num_hidden_layers)
    assert (ours.num_heads, ours.num_kv_heads) == (theirs.num_attention_heads, theirs.num_key_value_heads)
    default_dim = theirs.hidden_size // theirs.num_attention_heads
    assert ours.head_dim == getattr(theirs, "head_dim", default_dim)
    assert ours.rope == RopeConfig(theta=theirs.rope_parameters["rope_theta"])
    assert (ours.rms_norm_eps, ours.max_model_len) == (theirs.rms_norm_eps, theirs.max_position_embeddings)


def test_layers_of_qwen_that_slide() -> None:
    keys = {"use_sliding_window": True, "sliding_window": 64, "num_hidden_layers": 82}
    assert parse_config({"model_type": "qwen2_vl", "text_config": keys}).sliding_layers == (80, 81)
    assert parse_config({"model_type": "qwen2_vl", **keys}).sliding_layers == (80, 81)


def test_what_the_whole_model_says_counts() -> None:
    changed = GEMMA_3_4B | {"tie_word_embeddings": False, "quantization_config": {"quant_method": "fp8"}}
    assert text_model(changed)["quantization_config"] == {"quant_method": "fp8"}
    assert not parse_config(changed).tie_word_embeddings
    plain: dict[str, Any] = {"model_type": "llama"}
    assert text_model(plain) is plain


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["Gemma3ForSequenceClassification"]}, "Gemma3ForSequenceClassification"),
        ({"text_config": "gemma"}, "text_config 'gemma' is not an object"),
        ({"text_config": {"model_type": "gemma2"}}, "gemma2.*softcapping"),
        ({"text_config": {"model_type": "unheard_of"}}, "model_type 'unheard_of' is not supported"),
        ({"text_config": {"model_type": 3}}, "model_type 3"),
        ({"model_type": "mllama"}, "cross-attention"),
    ],
)
def test_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        parse_config(GEMMA_3_4B | changes)


def test_converted_is_the_text_model_alone(tmp_path: Path) -> None:
    theirs = write("gemma3", tmp_path / "source")
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.copy_(weight.bfloat16())  # as it will be stored
    theirs.save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "tokenizer.json").write_text('{"model": {"vocab": {}}}')
    convert(tmp_path / "source", tmp_path / "made")
    made = json.loads((tmp_path / "made" / "config.json").read_text())
    assert made["model_type"] == "gemma3_text"
    assert "vision_config" not in made
    assert read_config(tmp_path / "made") == read_config(tmp_path / "source")
    assert all(name.startswith("model.") for name in find_tensors(tmp_path / "made", tied=True).sources)
    check_served(tmp_path / "made", theirs)
