"""Content of a model directory's tokenizer.json, with the added tokens that only tokenizer_config.json lists. Free of
torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.files.json_values import Json, read_json_if_any, read_text
from models.files.special_tokens import numbers_of

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True, slots=True)
class TokenizerSource:
    """A tokenizer.

    text: as the tokenizers library takes it. added: ids of the tokens that tokenizer.json does not add. left_out: names
    of those that cannot be added, since the ids they should have are not the ones they would get.
    """

    text: str
    added: tuple[int, ...] = ()
    left_out: tuple[str, ...] = ()


def read_tokenizer_source(directory: Path) -> TokenizerSource:
    """Read tokenizer.json, and add what added_tokens_decoder of tokenizer_config.json has beyond it, as transformers
    does: tokens of the vocabulary, and new ones whose ids follow those of the others. What is no tokenizer is returned
    as it is. Raises ModelError: a file cannot be read, or tokenizer_config.json is no JSON object."""
    text = read_text(directory / "tokenizer.json", "a tokenizer")
    listed = _listed(read_json_if_any(directory / "tokenizer_config.json"))
    if not listed:
        return TokenizerSource(text)
    try:
        data = json.loads(text)
        numbers, tokens = numbers_of(data), data.get("added_tokens") or []
        known = {token["content"] for token in tokens}
        next_id = max(len(data["model"]["vocab"]), *(token["id"] + 1 for token in tokens), 0)
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError):
        return TokenizerSource(text)
    added, left_out = [], []
    for id, token in listed:
        name = token["content"]
        if name in known:
            continue
        if id != numbers.get(name, next_id):
            left_out.append(name)
            continue
        added.append({"id": id, **token})
        next_id = max(next_id, id + 1)
    if added:
        text = json.dumps(data | {"added_tokens": sorted([*tokens, *added], key=lambda token: token["id"])})
    return TokenizerSource(text, tuple(token["id"] for token in added), tuple(left_out))


def _listed(config: Json) -> list[tuple[int, dict[str, Any]]]:
    """Return the tokens that tokenizer_config.json lists, as tokenizer.json has them, by ascending id."""
    listed = config.get("added_tokens_decoder")
    found: dict[int, dict[str, Any]] = {}
    for id, token in listed.items() if isinstance(listed, dict) else ():
        if not isinstance(token, dict) or not isinstance(name := token.get("content"), str) or not name:
            continue
        if id.isdecimal() and len(id) < 10:
            flags = {flag: token.get(flag) is True for flag in _FLAGS}
            if not isinstance(token.get("normalized"), bool):
                flags["normalized"] = not flags["special"]
            found[int(id)] = {"content": name, **flags}
    return sorted(found.items())
