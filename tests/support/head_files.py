"""Files of `magicdec profile heads`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from engine.kv.streaming_heads import HeadShares


def write_head_shares(directory: Path, shares: Sequence[Sequence[float]]) -> str:
    """Write the file of a model with these shares, [layers][KV heads], and return its path."""
    listed = [list(layer) for layer in shares]
    file = directory / "heads.json"
    file.write_bytes(msgspec.json.encode(HeadShares(len(listed), len(listed[0]), 16, 256, 4096, listed)))
    return str(file)
