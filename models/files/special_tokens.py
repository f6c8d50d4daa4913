"""Special tokens that a model directory names, and their ids. Free of torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from models.files.json_values import Json, ModelError, read_json, read_json_if_any, short

_END = "<|endoftext|>"
_DEFAULTS = {
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "Qwen2Tokenizer": {"eos_token": _END, "unk_token": _END, "pad_token": _END},
    "GPT2Tokenizer": {"bos_token": _END, "eos_token": _END, "unk_token": _END},
}
"""Special tokens of a tokenizer_class that no file names."""


def read_special_tokens(directory: Path, has_token: Callable[[str], bool]) -> dict[str, str]:
    """Read the texts of the special tokens, by name: bos_token, eos_token and so on; absent ones are left out.

    tokenizer_config.json and special_tokens_map.json name them. As in transformers, the map's names come first, unless
    tokenizer_config.json has added_tokens_decoder; either names those that the other does not. What neither names is
    the default of the tokenizer's class. has_token: whether the vocabulary has a token, which a default needs. Raises
    ModelError.
    """
    config, others = _read(directory)
    first, last = (config, others) if "added_tokens_decoder" in config else (others, config)
    return _defaults(config, others, has_token) | _named(last) | _named(first)


def read_special_names(directory: Path) -> set[str]:
    """Read the texts of added tokens that tokenizer_config.json calls special (added_tokens_decoder). Raises
    ModelError."""
    added = read_json_if_any(directory / "tokenizer_config.json").get("added_tokens_decoder")
    tokens = added.values() if isinstance(added, dict) else ()
    return {
        token["content"]
        for token in tokens
        if isinstance(token, dict) and token.get("special") is True and isinstance(token.get("content"), str)
    }


def end_tokens(directory: Path) -> tuple[set[int], str | None]:
    """Return the ids of the tokens that the tokenizer's files name eos_token, and a warning if one has no id.

    An id is that of tokenizer.json, or else of the added tokens that are listed elsewhere. Raises ModelError.
    """
    config, others = _read(directory)
    file = directory / "tokenizer.json"
    ids = _added_tokens(directory, config) | (token_numbers(file) if file.is_file() else {})
    named = (_defaults(config, others, ids.__contains__), _named(config), _named(others))
    texts = {tokens["eos_token"] for tokens in named if "eos_token" in tokens}
    found = {text: id for text in texts if isinstance(id := ids.get(text), int)}
    without = sorted(texts - found.keys())
    warning = f"eos_token {short(without[0])} has no token id and never ends a text" if without else None
    return set(found.values()), warning


def token_numbers(file: Path) -> dict[str, int]:
    """Return the id of each token in a tokenizer.json, added tokens included. Raises ModelError."""
    data = read_json(file)
    try:
        return numbers_of(data)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{file}: not a tokenizer: {short(error)}") from error


def numbers_of(data: Json) -> dict[str, int]:
    """Return the same of the content of a tokenizer.json. What is none raises any of several errors."""
    vocab = data["model"]["vocab"]
    numbers = {entry[0]: number for number, entry in enumerate(vocab)} if isinstance(vocab, list) else dict(vocab)
    return numbers | {token.get("content"): token["id"] for token in data.get("added_tokens") or ()}


def _read(directory: Path) -> tuple[Json, Json]:
    """Return the contents of tokenizer_config.json and special_tokens_map.json."""
    config, others = directory / "tokenizer_config.json", directory / "special_tokens_map.json"
    return read_json_if_any(config), read_json_if_any(others)


def _named(data: Json) -> dict[str, str]:
    """Return the texts of the tokens that a file names, a model's own included."""
    own = {name: value for name, value in data.items() if name.endswith("_token")}
    for key in ("extra_special_tokens", "model_specific_special_tokens"):  # or a list of tokens without names
        if isinstance(value := data.get(key), dict):
            own |= value
    return {name: text for name, value in own.items() if (text := _text(value)) is not None}


def _defaults(config: Json, others: Json, has_token: Callable[[str], bool]) -> dict[str, str]:
    """Return the default tokens of the tokenizer's class that neither file mentions."""
    kind = config.get("tokenizer_class")
    defaults = _DEFAULTS.get(kind.removesuffix("Fast"), {}) if isinstance(kind, str) else {}
    left = {name: text for name, text in defaults.items() if name not in config and name not in others}
    return {name: text for name, text in left.items() if has_token(text)}


def _added_tokens(directory: Path, config: Json) -> dict[str, int]:
    """Return the ids of the added tokens that added_tokens.json and tokenizer_config.json list."""
    found = {text: id for text, id in read_json_if_any(directory / "added_tokens.json").items() if isinstance(id, int)}
    listed = config.get("added_tokens_decoder")
    for id, token in listed.items() if isinstance(listed, dict) else ():
        if id.isdecimal() and len(id) < 20 and (text := _text(token)) is not None:
            found[text] = int(id)
    return found


def _text(value: Any) -> str | None:
    """Parse a token, which is a string or an object with `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None
