"""Long real text for benchmarks: a file, or what every CPython carries - its own language reference."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics

from models.tokenizer import Tokenizer


def read_text(path: Path | None) -> str:
    """The text of a file, or, without one, of Python's help topics (about 700 kB of English prose and code)."""
    return path.read_text(encoding="utf-8") if path is not None else "\n\n".join(topics.values())


def passages(tokenizer: Tokenizer, text: str, *, count: int, length: int) -> list[list[int]]:
    """`count` stretches of `length` tokens, spread evenly over the text; they overlap if it is short.

    Raises ValueError if the text has fewer than `length` tokens.
    """
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) < length:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than the {length} of one context")
    step = (len(ids) - length) / max(1, count - 1)
    return [ids[int(i * step) : int(i * step) + length] for i in range(count)]
