"""Long real text for benchmarks: a file, or the language reference that CPython ships."""

from __future__ import annotations

from collections.abc import Sequence
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
    return spread(tokenizer.encode(text, add_special_tokens=False), count=count, length=length)


def spread(ids: Sequence[int], *, count: int, length: int, shared: int = 0) -> list[list[int]]:
    """Cut `count` passages of `length` tokens, spread evenly over a text.

    shared: number of tokens, the first of the text, that every passage begins with; its own are cut from the rest.
    Raises BenchError if the text is too short, or if that leaves a passage no token of its own.
    """
    if shared >= length:
        raise BenchError(f"{shared} shared tokens leave none of {length} to each row")
    if len(ids) < length:
        raise BenchError(f"the text has {len(ids)} tokens, fewer than the {length} of one context")
    begins, rest, own = list(ids[:shared]), ids[shared:], length - shared
    step = (len(rest) - own) / max(1, count - 1)
    return [begins + list(rest[int(i * step) : int(i * step) + own]) for i in range(count)]
