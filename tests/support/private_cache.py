"""A cache folder of the tests' own."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from models.default import user_cache

_folders: list[tempfile.TemporaryDirectory[str]] = []
"""Keeps the folder until the process ends."""


def use_private_cache() -> None:
    """Set a cache folder with the user's models, compiled kernels and packages, and nothing else: profiles that engines
    save are not the user's. Kernels that tests compile stay with the user, under the hash of their source."""
    cache = tempfile.TemporaryDirectory(prefix="tests-cache-")
    folder = Path(cache.name) / "magicdec"
    folder.mkdir()
    for name in ("models", "kernels", "wheels"):
        (user_cache() / name).mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(user_cache() / name)
    _folders.append(cache)
    os.environ["XDG_CACHE_HOME"] = cache.name
