"""Text models inside models that read images or audio too. Free of torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from models.files.json_values import Json, ModelError, short, token_ids


@dataclass(frozen=True, slots=True)
class Wrapper:
    """A model whose text model is served alone. name: of its class in transformers. text: model type of a text_config
    that does not say it. defaults: what transformers gives to absent keys, where that is not the model type's own."""

    name: str
    text: str
    defaults: Json = field(default_factory=dict)


_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def _sizes(*sizes: int) -> Json:
    return dict(zip(_SIZES, sizes, strict=True))


_QWEN2_VL = _sizes(152064, 8192, 29568, 80, 64) | {
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "max_window_layers": 80,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
}
_QWEN3_VL = _sizes(151936, 4096, 22016, 32, 32) | {"max_position_embeddings": 128000, "rope_theta": 5e5}
_VOXTRAL = _sizes(131072, 3072, 8192, 30, 32) | {
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e8,
}


WRAPPERS: Mapping[str, Wrapper] = {
    "gemma3": Wrapper("Gemma3ForConditionalGeneration", "gemma3_text"),
    "idefics3": Wrapper("Idefics3ForConditionalGeneration", "llama"),
    "internvl": Wrapper("InternVLForConditionalGeneration", "qwen2"),
    "llava": Wrapper("LlavaForConditionalGeneration", "llama"),
    "llava_next": Wrapper("LlavaNextForConditionalGeneration", "llama"),
    "mistral3": Wrapper("Mistral3ForConditionalGeneration", "mistral"),
    "qwen2_vl": Wrapper("Qwen2VLForConditionalGeneration", "qwen2_vl_text", _QWEN2_VL),
    "qwen2_5_vl": Wrapper("Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl_text", _QWEN2_VL),
    "qwen3_vl": Wrapper("Qwen3VLForConditionalGeneration", "qwen3_vl_text", _QWEN3_VL),
    "smolvlm": Wrapper("SmolVLMForConditionalGeneration", "llama"),
    "voxtral": Wrapper("VoxtralForConditionalGeneration", "llama", _VOXTRAL),
}
"""By the model type of config.json."""

_SAME_TEXT = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
"""Text models that compute text as another one does: their rotary embeddings turn by three positions per token (mrope),
which are the same in text."""
_DEFAULT_SIZES = {
    "gemma3_text": _sizes(262208, 2304, 9216, 26, 8),
    "llama": _sizes(32000, 4096, 11008, 32, 32),
    "mistral": _sizes(32000, 4096, 14336, 32, 32),
    "qwen2": _sizes(151936, 4096, 22016, 32, 32),
}
"""Sizes that transformers gives to absent keys, which files leave out of text_config only."""
_OF_THE_WHOLE = ("tie_word_embeddings", "bos_token_id", "quantization_config", "compression_config")
"""Keys that count for the text model wherever they stand; those of the whole model count first."""
_PREFIX = re.compile(r"(model\.language_model|language_model\.model|language_model|model\.text_model)\.")
_PLAIN = re.compile(r"(model\.(layers|embed_tokens|norm)|lm_head)\.")


def text_model(data: Json) -> Json:
    """Return the config.json of the text model alone, which has a model type of its own; `data` itself, if it is no
    Wrapper's. Raises ModelError."""
    wrapper = _wrapper(data)
    if wrapper is None:
        return data
    if data.get("architectures") not in (None, [], [wrapper.name]):
        raise ModelError(
            f"architectures {short(data['architectures'])} is not supported for model_type {data['model_type']!r}"
        )
    nested = data.get("text_config")
    if nested is None:  # old files of Qwen's have no text_config, but its keys
        text = {
            key: value for key, value in data.items() if key not in ("model_type", "architectures", "vision_config")
        }
    elif isinstance(nested, dict):
        text = {key: value for key, value in nested.items() if key != "architectures"}
    else:
        raise ModelError(f"text_config {short(nested)} is not an object")
    model_type = text.get("model_type") or wrapper.text
    text["model_type"] = _SAME_TEXT.get(model_type, model_type) if isinstance(model_type, str) else model_type
    text = wrapper.defaults | text
    if nested is not None and isinstance(text["model_type"], str):
        text = _DEFAULT_SIZES.get(text["model_type"], {}) | text
    text |= {key: data[key] for key in _OF_THE_WHOLE if data.get(key) is not None}
    if ends := {*token_ids(text, "eos_token_id"), *token_ids(data, "eos_token_id")}:
        text["eos_token_id"] = sorted(ends)
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(rope := text.get(key), dict):
            text[key] = _of_text(rope)
    return text


def describe_nesting(data: Json) -> list[str]:
    """Return warnings about what a model would read besides text."""
    if _wrapper(data) is None:
        return []
    return [f"model_type {data['model_type']}: only its text model is served; it reads no images and no audio"]


def text_tensor(name: str, data: Json) -> str | None:
    """Return a tensor's name in the text model alone; None: it is not part of it. data: content of config.json."""
    if _wrapper(data) is None or _PLAIN.match(name):
        return name
    if (found := _PREFIX.match(name)) is None:
        return None
    rest = name[found.end() :]
    return rest if rest.startswith("lm_head.") else f"model.{rest}"


def _wrapper(data: Json) -> Wrapper | None:
    model_type = data.get("model_type")
    return WRAPPERS.get(model_type) if isinstance(model_type, str) else None


def _of_text(rope: dict[str, Any]) -> dict[str, Any]:
    """Return rotary parameters without mrope: the three positions of a token of text are the same."""
    plain = {key: value for key, value in rope.items() if not key.startswith("mrope_")}
    for key in ("rope_type", "type"):
        if plain.get(key) == "mrope":
            plain[key] = "default"
    return plain
