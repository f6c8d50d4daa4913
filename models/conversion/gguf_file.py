"""Metadata of a GGUF file, and what an architecture makes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from models.files.json_values import Json, ModelError, short


class GGUFFile:
    """An open GGUF file. path: its own. tensors: as the gguf package describes them."""

    def __init__(self, path: Path) -> None:
        """Raises ModelError: it is no readable GGUF file."""
        import gguf

        self.path = path
        try:
            self._reader = gguf.GGUFReader(path)
        except Exception as error:  # the library checks little of what it reads
            raise ModelError(f"not a readable GGUF file: {error!r}") from error
        self.tensors: list[Any] = list(self._reader.tensors)

    def field(self, name: str) -> Any:
        """Return the value of a key; None if it is absent."""
        return self._reader.fields[name].contents() if name in self._reader.fields else None

    def needed(self, name: str) -> Any:
        """Return the value of a key. Raises ModelError if it is absent."""
        if (value := self.field(name)) is None:
            raise ModelError(f"has no key {name}")
        return value

    def token(self, name: str, count: int) -> int | None:
        """Return the id of a special token among `count` tokens; None if there is none, or not among them. name: eos
        and the like."""
        id = self.field(f"tokenizer.ggml.{name}_token_id")
        return id if isinstance(id, int) and 0 <= id < count else None

    def checked_token(self, name: str, count: int) -> int | None:
        """Return the same. Raises ModelError for an id that is not among the tokens."""
        if (id := self.token(name, count)) is None and self.field(key := f"tokenizer.ggml.{name}_token_id") is not None:
            raise ModelError(f"{key} {short(self.field(key))} is none of its {count} tokens")
        return id


@dataclass(frozen=True, slots=True)
class GGUFModel:
    """A model's config in Hugging Face terms, without its special tokens; its tokenizer; its chat template."""

    config: Json
    tokenizer: Tokenizer
    chat_template: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class GGUFArchitecture:
    """An architecture of GGUF files.

    read: raises ModelError for a file that cannot be carried over. layer_parts: name in transformers of a layer's
    part, by GGUF's. rotated: key of the number of heads, of parts whose rows are in GGUF's order: rotated pairs side by
    side, not half a head apart. norm_offset: what GGUF's norms have in addition to transformers'. end_tokens: tokens
    that end a text even if the file does not say so.
    """

    read: Callable[[GGUFFile], GGUFModel]
    layer_parts: Mapping[str, str]
    rotated: Mapping[str, str] = field(default_factory=dict)
    norm_offset: float = 0.0
    end_tokens: tuple[str, ...] = ()


def short_decimal(value: float) -> float:
    """Return the shortest decimal that rounds to the same float32, as which GGUF stores numbers."""
    return float(str(np.float32(value)))
