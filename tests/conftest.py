"""Settings and fixtures shared by all tests."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from models.default import default_model_dir, is_model_dir

# Set before any test module imports torch: OpenMP threads must sleep instead of spin where several processes share few
# cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_DEFAULT_MODEL = default_model_dir()
_CACHE = tempfile.TemporaryDirectory(prefix="tests-cache-")
# Engines must not write what they cache for their next start into the user's cache.
os.environ["XDG_CACHE_HOME"] = _CACHE.name


@pytest.fixture(scope="session")
def model_dir() -> Path:
    """Directory of the default model."""
    if not is_model_dir(_DEFAULT_MODEL):
        pytest.fail(f"the default model is not in {_DEFAULT_MODEL}: run `make model`", pytrace=False)
    return _DEFAULT_MODEL
