"""Parser of config.json for models of the Llama family. Free of torch, so that a server can read it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Json = dict[str, Any]

RopeKind = Literal["default", "linear", "llama3"]

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


class ModelError(ValueError):
    """A model directory that cannot be served; the message names the file, key or tensor at fault."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding: pair i rotates by theta^(-2i / head_dim) radians per position, scaled according to `kind`.

    linear: every pair rotates `factor` times slower. llama3: see kernels.rope.llama3_frequencies.
    """

    theta: float = 10000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder: RMS norms, rotary positions, grouped-query attention, gated SiLU MLP.

    Raises ModelError if the sizes contradict each other.
    """

    model_type: str = "llama"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """Whether queries and keys are normed per head before they are rotated."""
    sliding_window: int | None = None
    """Positions that a query attends to in at least one layer, its own included; None: all."""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    """Every token that ends a text, ascending."""

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"num_attention_heads ({self.num_heads}) is not a multiple of num_key_value_heads ({self.num_kv_heads})"
            )
        if self.head_dim % 2:
            raise ModelError(f"head_dim ({self.head_dim}) is odd: rotary embedding turns pairs")

    @property
    def max_model_len(self) -> int:
        """Longest request that the model serves exactly, in tokens.

        A sliding window caps it: only dense attention is computed, which equals sliding attention up to the window's
        length.
        """
        return min(self.max_position_embeddings, self.sliding_window or self.max_position_embeddings)


def read_config(directory: Path) -> ModelConfig:
    """Read config.json and, if there is one, generation_config.json of a model directory.

    Raises ModelError: no such directory, no or broken config.json, a model that is not supported.
    """
    if not directory.is_dir():
        raise ModelError(f"{directory}: no such model directory")
    path = directory / "config.json"
    if not path.is_file():
        raise ModelError(f"{path}: not found; a model directory holds config.json and *.safetensors")
    data = read_json(path)
    generation_path = directory / "generation_config.json"
    generation = read_json(generation_path) if generation_path.is_file() else {}
    try:
        return parse_config(data, generation)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None


def read_json(path: Path) -> Json:
    """Read the object in a JSON file. Raises ModelError: unreadable, not JSON, not an object."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: {error}") from error
    if not isinstance(data, dict):
        raise ModelError(f"{path}: expected a JSON object")
    return data


def parse_config(data: Json, generation: Json | None = None) -> ModelConfig:
    """Parse the content of config.json; `generation` is the content of generation_config.json.

    A text ends at the end-of-sequence tokens of both files. Absent keys have the defaults of transformers.
    Raises ModelError, which names the key and its value.
    """
    model_type = _supported(data)
    num_heads = _integer(data, "num_attention_heads")
    hidden_size = _integer(data, "hidden_size")
    biased = _flag(data, "attention_bias") if model_type in ("llama", "qwen3") else False
    max_positions = _integer(data, "max_position_embeddings")
    bos = data.get("bos_token_id")
    return ModelConfig(
        model_type=model_type,
        vocab_size=_integer(data, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_integer(data, "intermediate_size"),
        num_layers=_integer(data, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=_integer(data, "num_key_value_heads", num_heads),
        head_dim=_head_dim(data, model_type, hidden_size, num_heads),
        max_position_embeddings=max_positions,
        rms_norm_eps=_number(data, "rms_norm_eps", 1e-6),
        rope=_rope(data, max_positions),
        tie_word_embeddings=_flag(data, "tie_word_embeddings"),
        qkv_bias=biased or model_type == "qwen2",
        o_bias=biased,
        mlp_bias=_flag(data, "mlp_bias") if model_type == "llama" else False,
        qk_norm=model_type == "qwen3",
        sliding_window=_sliding_window(data, model_type),
        bos_token_id=None if bos is None else _integer(data, "bos_token_id", minimum=0),
        eos_token_ids=tuple(sorted({*_token_ids(data, "eos_token_id"), *_token_ids(generation or {}, "eos_token_id")})),
    )


def _supported(data: Json) -> str:
    """Return the model type. Raises ModelError for settings that change the arithmetic in a way not implemented."""
    model_type = data.get("model_type")
    if model_type not in _ARCHITECTURES:
        raise ModelError(f"model_type {model_type!r} is not supported; these are: {', '.join(_ARCHITECTURES)}")
    architectures = data.get("architectures")
    if architectures is not None and architectures != [_ARCHITECTURES[model_type]]:
        raise ModelError(f"architectures {architectures!r} is not supported for model_type {model_type!r}")
    for key in ("quantization_config", "compression_config", "num_experts", "num_local_experts"):
        if data.get(key):
            raise ModelError(f"{key} {data[key]!r} is not supported")
    if data.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ModelError(f"hidden_act {data['hidden_act']!r} is not supported; only silu is")
    return str(model_type)


def _head_dim(data: Json, model_type: str, hidden_size: int, num_heads: int) -> int:
    if data.get("head_dim") is not None:
        return _integer(data, "head_dim")
    if model_type == "qwen3":
        return 128
    if hidden_size % num_heads:
        raise ModelError(f"hidden_size ({hidden_size}) is not a multiple of num_attention_heads ({num_heads})")
    return hidden_size // num_heads


def _rope(data: Json, max_positions: int) -> RopeConfig:
    """Parse either spelling: `rope_theta` with `rope_scaling`, or `rope_parameters`, which includes both."""
    key = "rope_scaling" if data.get("rope_scaling") else "rope_parameters"
    rope = data.get(key) or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise ModelError(f"{key} {rope!r} is not supported; expected one set of parameters for all layers")
    rope = {"rope_theta": data.get("rope_theta", 10000.0), **rope}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", data.get("partial_rotary_factor", 1.0)) not in (None, 1):
        raise ModelError("partial_rotary_factor other than 1 is not supported")
    theta = _number(rope, "rope_theta")
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(theta=theta, kind="linear", factor=_number(rope, "factor"))
    if kind == "llama3":
        original = {"original_max_position_embeddings": max_positions, **rope}
        if data.get("original_max_position_embeddings") is not None:
            original["original_max_position_embeddings"] = data["original_max_position_embeddings"]
        low, high = _number(rope, "low_freq_factor"), _number(rope, "high_freq_factor")
        if low >= high:
            raise ModelError(f"{key}: low_freq_factor ({low}) must be below high_freq_factor ({high})")
        return RopeConfig(
            theta=theta,
            kind="llama3",
            factor=_number(rope, "factor"),
            low_freq_factor=low,
            high_freq_factor=high,
            original_max_positions=_integer(original, "original_max_position_embeddings"),
        )
    raise ModelError(f"{key}: rope_type {kind!r} is not supported; these are: default, linear, llama3")


def _sliding_window(data: Json, model_type: str) -> int | None:
    """Return the window if any layer uses it, else None."""
    if model_type == "llama" or (model_type != "mistral" and not _flag(data, "use_sliding_window")):
        return None
    if data.get("sliding_window", 4096) is None:
        return None
    window = _integer(data, "sliding_window", 4096)
    layer_types = data.get("layer_types")
    if model_type == "mistral":
        return window
    if layer_types is None:
        first = _integer(data, "max_window_layers", 28, minimum=0)
        return window if first < _integer(data, "num_hidden_layers") else None
    if not isinstance(layer_types, list) or set(layer_types) - {"full_attention", "sliding_attention"}:
        raise ModelError(f"layer_types {layer_types!r} is not supported")
    return window if "sliding_attention" in layer_types else None


def _token_ids(data: Json, key: str) -> list[int]:
    """Parse a key that holds one token id, a list of them, or nothing."""
    value = data.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(token, bool) or not isinstance(token, int) or token < 0 for token in ids):
        raise ModelError(f"{key} {value!r} is neither a token id nor a list of them")
    return ids


def _integer(data: Json, key: str, default: int | None = None, *, minimum: int = 1) -> int:
    """Parse an integer; `default` replaces an absent or null key."""
    value = data.get(key, default)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ModelError(f"{key} {value!r} is not an integer of at least {minimum}")
    return value


def _number(data: Json, key: str, default: float | None = None) -> float:
    value = data.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ModelError(f"{key} {value!r} is not a number above 0")
    return float(value)


def _flag(data: Json, key: str) -> bool:
    """Parse a boolean; absent and null are False."""
    value = data.get(key)
    if value not in (None, False, True):
        raise ModelError(f"{key} {value!r} is neither true nor false")
    return bool(value)
