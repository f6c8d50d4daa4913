"""What tests of every kind share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from models.default import default_model_dir, is_model_dir

# Before any test module imports torch: threads that sleep, not spin, where several processes share few cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture(scope="session")
def model_dir() -> Path:
    """The default model's directory."""
    directory = default_model_dir()
    if not is_model_dir(directory):
        pytest.fail(f"the default model is not in {directory}: run `make model`", pytrace=False)
    return directory
