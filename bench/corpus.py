"""Long real text for benchmarks: a file, or the language reference that CPython ships."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics

from models.tokenizer import Tokenizer


class BenchError(ValueError):
    """The measurement cannot be made as requested."""


def read_text(path: Path | None) -> str:
    """Read a file, or, without one, Python's help topics (about 700 kB of English prose and code).

    Raises BenchError for a file that is not UTF-8.
    """
    if path is None:
        return "\n\n".join(topics.values())
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise BenchError(f"{path}: not UTF-8 text") from None


def passages(tokenizer: Tokenizer, text: str, *, count: int, length: int) -> list[list[int]]:
    """Cut `count` passages of `length` tokens, spread evenly over the text. They overlap if the text is short.

    Raises BenchError if the text has fewer than `length` tokens.
    """
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) < length:
        raise BenchError(f"the text has {len(ids)} tokens, fewer than the {length} of one context")
    step = (len(ids) - length) / max(1, count - 1)
    return [ids[int(i * step) : int(i * step) + length] for i in range(count)]
