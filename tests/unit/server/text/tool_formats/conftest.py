"""The default tokenizer's cuts of a text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from models.tokenizer import IncrementalDecoder, Tokenizer


@pytest.fixture(scope="session")
def encode(tokenizer_dir: Path) -> Callable[[str], list[str]]:
    """Function that returns a text in pieces, as its tokens arrive."""
    tokenizer = Tokenizer(tokenizer_dir)

    def pieces(text: str) -> list[str]:
        decoder = IncrementalDecoder(tokenizer)
        return [*map(decoder.push, tokenizer.encode(text, add_special_tokens=False)), decoder.flush()]

    return pieces
