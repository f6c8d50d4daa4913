"""A checkpoint of any format as a conversion sees it, and reading one that is a Hugging Face style directory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from models.config import ModelError, read_json

NamedTensors = Iterable[tuple[str, torch.Tensor]]

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_PASSED_ON = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"),
    *("chat_template.jinja", "chat_template.json", "LICENSE"),
)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """config: Hugging Face keys.
    tensors: (Hugging Face name, tensor), read one at a time, in any order and dtype; walked through once.
    texts: name and content of the files that go with them: tokenizer.json and the like, not config.json.
    """

    config: dict[str, Any]
    tensors: NamedTensors
    texts: dict[str, str]


def open_directory(src: Path) -> Checkpoint:
    """Raises ModelError: config.json, tokenizer.json or safetensors weights are missing or broken."""
    gguf = min((path.name for path in src.glob("*.gguf")), default=None)
    hint = f"; to convert {gguf}, name that file" if gguf else ""
    for name in ("config.json", "tokenizer.json"):
        if not (src / name).is_file():
            raise ModelError(f"{src}: has no {name}{hint}")
    try:
        texts = {name: (src / name).read_text("utf-8") for name in _PASSED_ON if (src / name).is_file()}
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{src}: {error}") from error
    return Checkpoint(read_json(src / "config.json"), _read_tensors(_weight_files(src)), texts)


def _weight_files(src: Path) -> list[Path]:
    index = src / "model.safetensors.index.json"
    if not index.is_file():
        files = sorted(src.glob("*.safetensors"))
        if not files:
            pickle = min((path.name for pattern in _PICKLES for path in src.glob(pattern)), default=None)
            why = f", only pickled ones ({pickle}), which run code when they are read" if pickle else ""
            raise ModelError(f"{src}: has no safetensors weights{why}")
        return files
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ModelError(f"{index}: weight_map does not map tensors to files")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or not (src / name).is_file():
            raise ModelError(f"{index}: {name!r} is no file of this directory")
    return [src / name for name in names]


def _read_tensors(files: list[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    for file in files:
        try:
            with safe_open(str(file), framework="pt") as checkpoint:
                for name in checkpoint.keys():  # noqa: SIM118  (a safetensors handle is no mapping)
                    yield name, checkpoint.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file}: not a readable safetensors file: {error}") from error
