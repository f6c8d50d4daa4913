"""What tests of every kind share."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from models.default import default_model_dir, is_model_dir

# Before any test module imports torch: threads that sleep, not spin, where several processes share few cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_DEFAULT_MODEL = default_model_dir()
_CACHE = tempfile.TemporaryDirectory(prefix="tests-cache-")
# What engines keep for their next start is not for the user's.
os.environ["XDG_CACHE_HOME"] = _CACHE.name


@pytest.fixture(scope="session")
def model_dir() -> Path:
    """The default model's directory."""
    if not is_model_dir(_DEFAULT_MODEL):
        pytest.fail(f"the default model is not in {_DEFAULT_MODEL}: run `make model`", pytrace=False)
    return _DEFAULT_MODEL
