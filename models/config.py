"""Parser of config.json. Free of torch, so that a server can read it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from models.architectures import Architecture, find_architecture
from models.files.foreign_keys import refuse_foreign_keys
from models.files.json_values import (
    MAX_PARTS,
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
from models.files.nested_text import describe_nesting, text_model
from models.files.rope_config import ORIGINAL, SLIDING, RopeConfig, parse_rope, served_positions
from models.files.special_tokens import end_tokens
from models.model_config import ModelConfig

__all__ = ["Json", "ModelConfig", "ModelError", "RopeConfig", "parse_config", "read_config", "read_json"]


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
    """Parse the content of config.json; of a model that reads more than text, its text model's. generation: content of
    generation_config.json. end_ids: the tokenizer's own end-of-sequence tokens.

    A text ends at the end-of-sequence tokens of all three. Absent keys have the defaults of transformers.
    Raises ModelError, which names the key and its value.
    """
    nesting, data = describe_nesting(data), text_model(data)
    architecture = find_architecture(data)
    refuse_foreign_keys(data, architecture.reads)
    if architecture.original_positions is not None:
        data = {ORIGINAL: architecture.original_positions} | data
    model_type, vocab_size = str(data["model_type"]), integer(data, "vocab_size")
    num_heads, hidden_size = integer(data, "num_attention_heads"), integer(data, "hidden_size")
    stated_positions = integer(data, "max_position_embeddings", architecture.max_positions)
    max_positions, warnings = served_positions(data, stated_positions)
    rope, sliding_rope = (
        parse_rope(data, stated_positions, layer_type, architecture.rope) for layer_type in (None, SLIDING)
    )
    ends = {*token_ids(data, "eos_token_id"), *token_ids(generation or {}, "eos_token_id"), *end_ids}
    warnings += [
        f"eos_token_id {short(token)} is not in the vocabulary of {vocab_size} (vocab_size) and never ends a text"
        for token in sorted(ends)
        if not 0 <= token < vocab_size
    ]
    plain = ModelConfig(
        model_type=model_type,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=integer(data, "intermediate_size"),
        num_layers=integer(data, "num_hidden_layers", maximum=MAX_PARTS),
        num_heads=num_heads,
        num_kv_heads=_kv_heads(data, architecture, num_heads),
        head_dim=_head_dim(data, architecture, hidden_size, num_heads),
        max_position_embeddings=max_positions,
        rms_norm_eps=number(data, "rms_norm_eps", architecture.rms_norm_eps),
        rope=rope,
        sliding_rope=None if sliding_rope == rope else sliding_rope,
        tie_word_embeddings=flag(data, "tie_word_embeddings", architecture.ties_embeddings),
        bos_token_id=None if data.get("bos_token_id") in (None, -1) else integer(data, "bos_token_id", minimum=0),
        eos_token_ids=tuple(sorted(token for token in ends if 0 <= token < vocab_size)),
        warnings=(*nesting, *warnings),
    )
    return architecture.complete(data, plain)


def _kv_heads(data: Json, architecture: Architecture, num_heads: int) -> int:
    """Parse num_key_value_heads: absent, it is the family's; null, it is the number of heads."""
    default = num_heads if "num_key_value_heads" in data else architecture.kv_heads or num_heads
    return integer(data, "num_key_value_heads", default)


def _head_dim(data: Json, architecture: Architecture, hidden_size: int, num_heads: int) -> int:
    if data.get("head_dim") is not None:
        return integer(data, "head_dim")
    if architecture.head_dim is not None and "head_dim" not in data:
        return architecture.head_dim
    if hidden_size % num_heads:
        raise ModelError(f"hidden_size ({hidden_size}) is not a multiple of num_attention_heads ({num_heads})")
    return hidden_size // num_heads
