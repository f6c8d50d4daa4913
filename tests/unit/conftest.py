"""Draft models on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engines import TINY
from tests.ranks import DRAFT, write_random_model


@pytest.fixture(scope="session")
def draft_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("models") / "draft", DRAFT)


@pytest.fixture(scope="session")
def twin_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A draft model with the target's own weights."""
    return write_random_model(tmp_path_factory.mktemp("models") / "twin", TINY)
