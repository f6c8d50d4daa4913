"""Parser of config.json for models of the Llama family. Free of torch, so that a server can read it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from models.files.foreign_keys import refuse_foreign_keys
from models.files.json_values import (
    Json,
    ModelError,
    describe_no_directory,
    flag,
    integer,
    number,
    read_json,
    read_json_if_any,
    short,
    token_ids,
)
from models.files.rope_config import RopeConfig, parse_rope, served_positions
from models.files.special_tokens import end_tokens

__all__ = ["Json", "ModelConfig", "ModelError", "RopeConfig", "parse_config", "read_config", "read_json"]

_PLAIN_ROPE = RopeConfig()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Family:
    """Architecture of a model type, and the values that transformers gives to absent keys.

    kv_heads, head_dim: None: as many as heads; hidden_size by heads. aliases: other names of the architecture.
    """

    architecture: str
    aliases: tuple[str, ...] = ()
    max_positions: int
    kv_heads: int | None = None
    head_dim: int | None = None
    rms_norm_eps: float = 1e-6


_FAMILIES = {
    "llama": _Family(architecture="LlamaForCausalLM", aliases=("LLaMAForCausalLM",), max_positions=2048),
    "mistral": _Family(architecture="MistralForCausalLM", max_positions=131072, kv_heads=8),
    "qwen2": _Family(architecture="Qwen2ForCausalLM", max_positions=32768, kv_heads=32),
    "qwen3": _Family(architecture="Qwen3ForCausalLM", max_positions=32768, kv_heads=32, head_dim=128),
    "seed_oss": _Family(architecture="SeedOssForCausalLM", max_positions=524288, kv_heads=8, head_dim=128),
    "internlm3": _Family(
        architecture="InternLM3ForCausalLM",
        aliases=("LlamaForCausalLM",),  # transformers saves it as one
        max_positions=32768,
        kv_heads=2,
        head_dim=128,
        rms_norm_eps=1e-5,
    ),
}


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
    """Positions at which the model computes what it was made for: those of config.json, which linear scaling multiplies
    by its factor, as transformers documents it; so also where a file already states the scaled positions."""
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = _PLAIN_ROPE
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
    warnings: tuple[str, ...] = field(default=(), compare=False, repr=False)
    """Parts of the model's files that are not served as they are written; logged where the model is loaded."""

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
    """Read config.json of a model directory, and the end-of-sequence tokens that its other files name:
    generation_config.json, tokenizer_config.json and special_tokens_map.json.

    Raises ModelError: no such directory, no or broken config.json, a model that is not supported.
    """
    if not directory.is_dir():
        raise ModelError(describe_no_directory(directory))
    path = directory / "config.json"
    if not path.is_file():
        raise ModelError(f"{path}: not found; a model directory holds config.json and *.safetensors")
    data = read_json(path)
    generation, (ends, warning) = read_json_if_any(directory / "generation_config.json"), end_tokens(directory)
    try:
        config = parse_config(data, generation, ends)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    if warning is None and not config.eos_token_ids:
        warning = "no end-of-sequence token: texts end at max_tokens"
    return config if warning is None else replace(config, warnings=(*config.warnings, warning))


def parse_config(data: Json, generation: Json | None = None, end_ids: Iterable[int] = ()) -> ModelConfig:
    """Parse the content of config.json. generation: content of generation_config.json. end_ids: the tokenizer's own
    end-of-sequence tokens.

    A text ends at the end-of-sequence tokens of all three. Absent keys have the defaults of transformers.
    Raises ModelError, which names the key and its value.
    """
    family = _family(data)
    model_type, vocab_size = str(data["model_type"]), integer(data, "vocab_size")
    num_heads, hidden_size = integer(data, "num_attention_heads"), integer(data, "hidden_size")
    stated_positions = integer(data, "max_position_embeddings", family.max_positions)
    max_positions, warnings = served_positions(data, stated_positions)
    qkv_bias, o_bias, mlp_bias = _biases(data, model_type)
    ends = {*token_ids(data, "eos_token_id"), *token_ids(generation or {}, "eos_token_id"), *end_ids}
    warnings += [
        f"eos_token_id {short(token)} is not in the vocabulary of {vocab_size} (vocab_size) and never ends a text"
        for token in sorted(ends)
        if not 0 <= token < vocab_size
    ]
    return ModelConfig(
        model_type=model_type,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=integer(data, "intermediate_size"),
        num_layers=integer(data, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=_kv_heads(data, family, num_heads),
        head_dim=_head_dim(data, family, hidden_size, num_heads),
        max_position_embeddings=max_positions,
        rms_norm_eps=number(data, "rms_norm_eps", family.rms_norm_eps),
        rope=parse_rope(data, stated_positions),
        tie_word_embeddings=flag(data, "tie_word_embeddings"),
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        mlp_bias=mlp_bias,
        qk_norm=model_type == "qwen3",
        sliding_window=_sliding_window(data, model_type),
        bos_token_id=None if data.get("bos_token_id") in (None, -1) else integer(data, "bos_token_id", minimum=0),
        eos_token_ids=tuple(sorted(token for token in ends if 0 <= token < vocab_size)),
        warnings=tuple(warnings),
    )


def _family(data: Json) -> _Family:
    """Return the model's family. Raises ModelError for settings that change the arithmetic in a way not implemented."""
    model_type = data.get("model_type")
    if not isinstance(model_type, str) or model_type not in _FAMILIES:
        raise ModelError(f"model_type {short(model_type)} is not supported; these are: {', '.join(_FAMILIES)}")
    family, architectures = _FAMILIES[model_type], data.get("architectures")
    if architectures not in (None, [], [family.architecture], *([alias] for alias in family.aliases)):
        raise ModelError(f"architectures {short(architectures)} is not supported for model_type {model_type!r}")
    refuse_foreign_keys(data)
    return family


def _kv_heads(data: Json, family: _Family, num_heads: int) -> int:
    """Parse num_key_value_heads: absent, it is the family's; null, it is the number of heads."""
    default = num_heads if "num_key_value_heads" in data else family.kv_heads or num_heads
    return integer(data, "num_key_value_heads", default)


def _head_dim(data: Json, family: _Family, hidden_size: int, num_heads: int) -> int:
    if data.get("head_dim") is not None:
        return integer(data, "head_dim")
    if family.head_dim is not None and "head_dim" not in data:
        return family.head_dim
    if hidden_size % num_heads:
        raise ModelError(f"hidden_size ({hidden_size}) is not a multiple of num_attention_heads ({num_heads})")
    return hidden_size // num_heads


def _biases(data: Json, model_type: str) -> tuple[bool, bool, bool]:
    """Return which projections have biases: query, key and value; attention's output; the feed-forward network."""
    if model_type == "qwen2":
        return True, False, False
    if model_type == "mistral":
        return False, False, False
    if model_type == "internlm3":  # its own names, and those that transformers gives to Llama
        other = flag(data, "bias", flag(data, "mlp_bias"))
        return flag(data, "qkv_bias", flag(data, "attention_bias")), other, other
    if model_type == "seed_oss":
        return flag(data, "attention_bias", True), flag(data, "attention_out_bias"), flag(data, "mlp_bias")
    biased = flag(data, "attention_bias")
    return biased, biased, model_type == "llama" and flag(data, "mlp_bias")


def _sliding_window(data: Json, model_type: str) -> int | None:
    """Return the window if any layer uses it, else None."""
    layer_types, num_layers = data.get("layer_types") or [], integer(data, "num_hidden_layers")
    if layer_types and len(layer_types) != num_layers:
        raise ModelError(f"layer_types has {len(layer_types)} entries for {num_layers} layers (num_hidden_layers)")
    is_qwen = model_type in ("qwen2", "qwen3")
    uses_window = is_qwen and flag(data, "use_sliding_window")
    default = 4096 if (is_qwen or model_type == "mistral") and "sliding_window" not in data else None
    if "sliding_attention" in layer_types:
        return integer(data, "sliding_window", default)
    if model_type == "mistral" or (uses_window and not layer_types):
        if data.get("sliding_window", default) is None:
            return None
        window = integer(data, "sliding_window", default)
        first = integer(data, "max_window_layers", 28, minimum=0) if is_qwen else 0
        return window if first < num_layers else None
    return None
