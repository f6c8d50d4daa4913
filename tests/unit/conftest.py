"""Draft models on disk, and Triton's interpreter on machines without a GPU."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from tests.support.engines import TINY
from tests.support.ranks import DRAFT, write_random_model
from tests.support.tiny import write_tokenizer

if not torch.cuda.is_available():  # Triton reads the variable when a test module first imports it
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_finish() -> None:
    """Hasten Triton's interpreter, if a test module has imported it."""
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET"):
        from tests.support.quick_interpreter import hasten

        hasten()


@pytest.fixture(scope="session")
def draft_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("models") / "draft", DRAFT)


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with the tokenizer that an engine needs besides a loaded model."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    write_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def twin_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a draft model with the target's own weights."""
    return write_random_model(tmp_path_factory.mktemp("models") / "twin", TINY)
