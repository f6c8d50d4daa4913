"""Special tokens that a model directory names, and their ids. Free of torch."""

from __future__ import annotations

from pathlib import Path

from models.files.json_values import Json, ModelError, read_json, read_json_if_any

_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def read_special_tokens(directory: Path) -> dict[str, str]:
    """Read the texts of the special tokens, by name: bos_token, eos_token and so on; absent ones are left out.

    tokenizer_config.json names them; special_tokens_map.json names those that it does not. Raises ModelError.
    """
    files = [read_json_if_any(directory / name) for name in ("special_tokens_map.json", "tokenizer_config.json")]
    texts = {name: text for file in files for name in _NAMES if (text := _text(file, name)) is not None}
    return {name: texts[name] for name in _NAMES if name in texts}


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


def end_token_id(directory: Path) -> int | None:
    """Return the id of the tokenizer's eos_token; None if it has none, or no id. Raises ModelError."""
    text = read_special_tokens(directory).get("eos_token")
    file = directory / "tokenizer.json"
    return None if text is None or not file.is_file() else token_numbers(file).get(text)


def token_numbers(file: Path) -> dict[str, int]:
    """Return the id of each token in a tokenizer.json, added tokens included. Raises ModelError."""
    data = read_json(file)
    try:
        vocab = data["model"]["vocab"]
        numbers = {entry[0]: number for number, entry in enumerate(vocab)} if isinstance(vocab, list) else dict(vocab)
        return numbers | {token.get("content"): token["id"] for token in data.get("added_tokens") or ()}
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{file}: not a tokenizer: {error!r}") from error


def _text(data: Json, name: str) -> str | None:
    """Parse a token, which is a string or an object with `content`."""
    value = data.get(name)
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None
