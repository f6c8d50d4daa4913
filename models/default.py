"""Location of the models that have names: outside the checkout, one copy per user. Free of torch."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from models.config import ModelError

NAME = "SmolLM2-135M-Instruct"
MODELS = {"default": NAME, "default-int4": f"{NAME}-int4"}
"""Directories of the models that `magicdec fetch` installs, by their names in settings. default: in bfloat16.
default-int4: with the codes and scales of the file that both are made from: matrices of 4 bits, an embedding of 8."""
GEMMA = "gemma-3-270m"
OPTIONAL = {GEMMA: GEMMA}
"""Directories of models that `magicdec fetch NAME` alone installs, by their names in settings."""


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


def default_model_dir(model: str = "default") -> Path:
    """Return the directory of a model of MODELS or OPTIONAL; it exists once `magicdec fetch` has run."""
    return cache_dir() / (MODELS | OPTIONAL)[model]


def is_model_dir(directory: Path) -> bool:
    """Whether `directory` holds a model in the served format; a conversion writes it completely or not at all."""
    return (directory / "config.json").is_file() and (directory / "tokenizer.json").is_file()


def missing_models() -> list[str]:
    """List the models of MODELS that are not installed."""
    return [model for model in MODELS if not is_model_dir(default_model_dir(model))]


def resolve_model(model: str) -> Path:
    """Return the directory for the setting `engine.model`, which is a path or a name of MODELS or OPTIONAL.

    Raises ModelError if that model is not installed. Any other path is checked when the model is read.
    """
    if model not in MODELS and model not in OPTIONAL:
        return Path(model).expanduser()
    directory = default_model_dir(model)
    if not is_model_dir(directory):
        command = "magicdec fetch" if model in MODELS else f"magicdec fetch {model}"
        raise ModelError(f"the model {model!r} is not installed; `{command}` downloads and converts it")
    return directory
