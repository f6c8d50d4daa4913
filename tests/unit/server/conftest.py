"""A directory with a tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.tiny import write_tokenizer


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    write_tokenizer(directory)
    return directory
