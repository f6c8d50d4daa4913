"""Where the default model lives: outside the checkout, one copy per user. Free of torch."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from models.config import ModelError

NAME = "SmolLM2-135M-Instruct"


def user_cache() -> Path:
    """The user's cache folder (XDG convention): everything in it can be made or downloaded again.

    Raises FileNotFoundError for a user without a home, as a number that a container was told to run as.
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
    """Where downloaded models are."""
    return user_cache() / "models"


def default_model_dir() -> Path:
    """Directory of the model that `default` means; it exists once `magicdec fetch` has run."""
    return cache_dir() / NAME


def is_model_dir(directory: Path) -> bool:
    """Whether `directory` holds a model in the served format; one appears there whole or not at all."""
    return (directory / "config.json").is_file() and (directory / "tokenizer.json").is_file()


def resolve_model(model: str) -> Path:
    """The directory that the setting `engine.model` means: a path, or `default`.

    Raises ModelError when the default model is asked for and not there; any other path is checked by who reads it.
    """
    if model != "default":
        return Path(model).expanduser()
    directory = default_model_dir()
    if not is_model_dir(directory):
        raise ModelError("the default model is not installed; `magicdec fetch` downloads and converts it")
    return directory
