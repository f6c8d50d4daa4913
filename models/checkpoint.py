"""Checkpoint to convert, independent of its file format, and a reader for Hugging Face style directories."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from models.config import ModelError, read_json
from models.weights import opened, weight_files

NamedTensors = Iterable[tuple[str, torch.Tensor]]

_PASSED_ON = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"),
    *("chat_template.jinja", "chat_template.json", "LICENSE"),
)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint in Hugging Face terms.

    config: Hugging Face keys.
    tensors: (Hugging Face name, tensor), read one at a time, in any order and dtype; can be iterated once.
    texts: name and content of the accompanying files: tokenizer.json and the like, not config.json.
    """

    config: dict[str, Any]
    tensors: NamedTensors
    texts: dict[str, str]


def open_directory(src: Path) -> Checkpoint:
    """Open a directory. Raises ModelError: config.json, tokenizer.json or safetensors weights are missing or broken."""
    gguf = min((path.name for path in src.glob("*.gguf")), default=None)
    hint = f"; to convert {gguf}, name that file" if gguf else ""
    for name in ("config.json", "tokenizer.json"):
        if not (src / name).is_file():
            raise ModelError(f"{src}: has no {name}{hint}")
    try:
        texts = {name: (src / name).read_text("utf-8") for name in _PASSED_ON if (src / name).is_file()}
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{src}: {error}") from error
    return Checkpoint(read_json(src / "config.json"), _read_tensors(weight_files(src)), texts)


def _read_tensors(files: list[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    for file in files:
        with opened(file) as checkpoint:
            for name in checkpoint.keys():  # noqa: SIM118  (a safetensors handle is not a mapping)
                yield name, checkpoint.get_tensor(name)
