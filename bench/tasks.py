"""Prompts of four kinds of work, of which all but the first copy from their prompt.

    free      a passage of text, to be continued
    summary   a document, and its summary in quotations
    edit      a source file, and the same file with changes
    json      a table, and the same table as JSON

Each answer is begun in the prompt, so that small models do what is asked.
"""

from __future__ import annotations

import json
import random
import sysconfig
from collections.abc import Callable, Mapping
from pathlib import Path

from bench.corpus import BenchError, spread
from models.tokenizer import Tokenizer

_BEGUN = 40
"""Tokens of a file's new version that the prompt contains."""
_NAMES = (
    "Ada",
    "Boris",
    "Chen",
    "Dora",
    "Emil",
    "Fatima",
    "Goran",
    "Hana",
    "Ivan",
    "Jana",
    "Karl",
    "Lena",
    "Mio",
    "Nina",
)
_CITIES = ("Aachen", "Bergen", "Cadiz", "Dakar", "Essen", "Fez", "Ghent", "Hanoi", "Izmir", "Jena", "Kyoto", "Lima")


def task_prompts(task: str, tokenizer: Tokenizer, text: str, *, count: int, length: int) -> list[list[int]]:
    """Build `count` different prompts of `length` tokens. text: source of passages and documents. Raises BenchError for
    a length without room, or a text that is too short."""
    return _TASKS[task](tokenizer, text, count, length)


def cutter(task: str, tokenizer: Tokenizer, text: str) -> Callable[[int, int, int], list[list[int]]]:
    """Return a function from (count, length, shared) to prompts of a task, which begin with the same `shared` tokens:
    of passages alone."""
    if task != "free":

        def prompts(count: int, length: int, shared: int) -> list[list[int]]:
            if shared:
                raise BenchError("only passages of text, --task free, begin with the same tokens")
            return task_prompts(task, tokenizer, text, count=count, length=length)

        return prompts
    ids = _encode(tokenizer, text)
    return lambda count, length, shared: spread(ids, count=count, length=length, shared=shared)


def _free(tokenizer: Tokenizer, text: str, count: int, length: int) -> list[list[int]]:
    return spread(_encode(tokenizer, text), count=count, length=length)


def _summary(tokenizer: Tokenizer, text: str, count: int, length: int) -> list[list[int]]:
    head = _encode(tokenizer, "A document:\n\n")
    tail = _encode(tokenizer, '\n\nEnd of the document. A summary that quotes its most important sentences:\n\n"')
    documents = spread(_encode(tokenizer, text), count=count, length=_room(length, head, tail))
    return [[*head, *document, *tail] for document in documents]


def _edit(tokenizer: Tokenizer, text: str, count: int, length: int) -> list[list[int]]:
    """The files are those of Python's library, whatever the text."""
    library = Path(sysconfig.get_path("stdlib"))
    code = "\n\n".join(file.read_text(encoding="utf-8") for file in sorted(library.glob("*.py")))
    head, tail = _encode(tokenizer, "A file:\n\n"), _encode(tokenizer, "\n\nThe same file, with type annotations:\n\n")
    files = spread(_encode(tokenizer, code), count=count, length=_room(length, head, tail, _BEGUN))
    return [[*head, *file, *tail, *file[:_BEGUN]] for file in files]


def _json(tokenizer: Tokenizer, text: str, count: int, length: int) -> list[list[int]]:
    """The tables are made up, whatever the text."""
    prompts = []
    for seed in range(count):
        rng = random.Random(seed)
        rows = [
            {"id": 1000 + i, "name": rng.choice(_NAMES), "city": rng.choice(_CITIES), "year": rng.randrange(1950, 2020)}
            for i in range(length // 8)
        ]
        lines = [",".join(map(str, row.values())) for row in rows]
        head = _encode(tokenizer, "A table:\n\nid,name,city,year\n")
        begun = "".join(f"{json.dumps(row)},\n" for row in rows[:2])
        tail = _encode(tokenizer, f"\n\nThe same table as JSON, all rows:\n\n[\n{begun}")
        table = _encode(tokenizer, "\n".join(lines))
        prompts.append([*head, *table[: _room(length, head, tail)], *tail])
    return prompts


_TASKS: Mapping[str, Callable[[Tokenizer, str, int, int], list[list[int]]]] = {
    "free": _free,
    "summary": _summary,
    "edit": _edit,
    "json": _json,
}
TASKS = tuple(_TASKS)


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def _room(length: int, head: list[int], tail: list[int], more: int = 0) -> int:
    """Return the tokens that are left for a document."""
    room = length - len(head) - len(tail) - more
    if room < _BEGUN:
        raise BenchError(f"a prompt of {length} tokens leaves no room for a document")
    return room
