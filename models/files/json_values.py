"""JSON files of a model directory, and checks of their values. Free of torch."""

from __future__ import annotations

import json
import reprlib
import sys
from pathlib import Path
from typing import Any

Json = dict[str, Any]

_LFS_POINTER = "version https://git-lfs"
"""First bytes of the file that git leaves in place of a large one that was not downloaded."""
_LARGEST = 2**31 - 1
MAX_PARTS = 10**4
"""Largest number of layers, or of experts of a layer: some work is done for each before any weight is read."""
_WIDTH = 80
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxlong = _REPR.maxother = _WIDTH


class ModelError(ValueError):
    """A model directory that cannot be served; the message names the file, key or tensor at fault."""


def short(value: Any) -> str:
    """Return the representation of a value for a message, in at most 80 characters."""
    text = _REPR.repr(value)
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 1]}…"


def describe_no_directory(path: Path) -> str:
    """Describe why `path`, which is not a directory, cannot be served."""
    if path.suffix == ".gguf" and path.is_file():
        return f"{path}: a GGUF file is not served as it is; convert it: magicdec convert {path} DIRECTORY"
    if path.exists():
        return f"{path}: not a directory; a model directory holds config.json and *.safetensors"
    return f"{path}: no such model directory"


def is_lfs_pointer(path: Path) -> bool:
    """Whether the file is a git-lfs pointer."""
    with path.open("rb") as file:
        return file.read(len(_LFS_POINTER)) == _LFS_POINTER.encode()


def describe_lfs_pointer(path: Path, what: str) -> str:
    """what: the file's content, had it been downloaded."""
    return f"{path}: a git-lfs pointer, not {what}; run `git lfs pull` in its directory"


def read_text(path: Path, what: str) -> str:
    """Read a text file. what: its content, in messages. Raises ModelError: unreadable, not UTF-8, a git-lfs pointer."""
    try:
        if is_lfs_pointer(path):
            raise ModelError(describe_lfs_pointer(path, what))
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: {error}") from None


def read_json(path: Path) -> Json:
    """Read the object in a JSON file. Raises ModelError: unreadable, not JSON, not an object."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: {error}") from error
    except (ValueError, RecursionError) as error:
        if is_lfs_pointer(path):
            raise ModelError(describe_lfs_pointer(path, "JSON")) from None
        raise ModelError(f"{path}: {error}") from error
    if not isinstance(data, dict):
        raise ModelError(f"{path}: expected a JSON object")
    return data


def read_json_if_any(path: Path) -> Json:
    """Like read_json, but an absent file is an empty object."""
    return read_json(path) if path.is_file() else {}


def integer(data: Json, key: str, default: int | None = None, *, minimum: int = 1, maximum: int = _LARGEST) -> int:
    """Parse an integer of at most `maximum`; `default` replaces an absent or null key."""
    value = data.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
        raise ModelError(f"{key} {short(value)} is not an integer from {minimum} to {maximum}")
    return value


def number(data: Json, key: str, default: float | None = None) -> float:
    """Parse a finite number above 0; `default` replaces an absent or null key."""
    value = data.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
        raise ModelError(f"{key} {short(value)} is not a finite number above 0")
    return float(value)


def flag(data: Json, key: str, default: bool = False) -> bool:
    """Parse a boolean; `default` replaces an absent or null key."""
    value = data.get(key)
    value = default if value is None else value
    if value not in (False, True):
        raise ModelError(f"{key} {short(value)} is neither true nor false")
    return bool(value)


def token_ids(data: Json, key: str) -> list[int]:
    """Parse a key that holds one token id, a list of them, or nothing."""
    value = data.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(token, bool) or not isinstance(token, int) for token in ids):
        raise ModelError(f"{key} {short(value)} is neither a token id nor a list of them")
    return ids
