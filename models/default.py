"""Location of the default model: outside the checkout, one copy per user. Free of torch."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from models.config import ModelError

NAME = "SmolLM2-135M-Instruct"


def user_cache() -> Path:
    """Return the user's cache directory (XDG convention); everything in it can be rebuilt or downloaded again.

    Raises FileNotFoundError for a user without a home directory, e.g. a bare user id that a container runs as.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):
        return Path(base) / "magicdec"
    try:
        return Path.home() / ".cache" / "magicdec"
    except RuntimeError as error:
        why = "the user has no home directory; set HOME or XDG_CACHE_HOME"
        raise FileNotFoundError(errno.ENOENT, why, "~") from error


def cache_dir() -> Path:
    """Return the directory of downloaded models."""
    return user_cache() / "models"


def default_model_dir() -> Path:
    """Return the directory of the model `default`; it exists once `magicdec fetch` has run."""
    return cache_dir() / NAME


def is_model_dir(directory: Path) -> bool:
    """Whether `directory` holds a model in the served format; a conversion writes it completely or not at all."""
    return (directory / "config.json").is_file() and (directory / "tokenizer.json").is_file()


def resolve_model(model: str) -> Path:
    """Return the directory for the setting `engine.model`, which is a path or `default`.

    Raises ModelError if the default model is not installed. Any other path is checked when the model is read.
    """
    if model != "default":
        return Path(model).expanduser()
    directory = default_model_dir()
    if not is_model_dir(directory):
        raise ModelError("the default model is not installed; `magicdec fetch` downloads and converts it")
    return directory
