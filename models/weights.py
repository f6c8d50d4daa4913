"""Safetensors files of a model directory. Pickled weights are never opened, only named in errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from models.config import ModelError, read_json

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def weight_files(path: Path) -> list[Path]:
    """List the model's safetensors files: those in the index, else model.safetensors, else all. Raises ModelError."""
    index = path / _INDEX
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ModelError(f"{index}: weight_map does not map tensors to files")
        names = sorted(set(weight_map.values()))
        for name in names:
            if Path(name).name != name:
                raise ModelError(f"{index}: {name!r} is not a file of this directory")
            if not (path / name).is_file():
                raise ModelError(f"{path / name}: not found, but listed in {_INDEX}")
        return [path / name for name in names]
    if (path / _SINGLE).is_file():
        return [path / _SINGLE]
    files = sorted(path.glob("*.safetensors"))
    if not files:
        pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
        only = f", only pickled weights ({pickles[0]}), which run code when they are read" if pickles else ""
        raise ModelError(f"{path}: has no safetensors weights{only}")
    return files


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """Open a safetensors file. Raises ModelError if it is not a readable one."""
    try:
        with safe_open(str(file), framework="pt") as checkpoint:
            yield checkpoint
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: not a readable safetensors file: {error}") from error
