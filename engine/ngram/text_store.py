"""A text store: what followed every context of a large text, in one file that is read where it lies (SSSD, arXiv
2411.05894).

The file is in the safetensors format: `reversed`, the text's tokens from last to first, big-endian; `order`, its sorted
contexts (engine.ngram.context_array); and as metadata, the tokenizer that made the tokens. SEPARATOR stands between two
texts: nothing that is proposed crosses it.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import save_file

from engine.ngram.context_array import ContextArray, pack_reversed, sort_contexts

SEPARATOR = 2**32 - 1
_KIND = "magicdec text store 1"
_ORDER_TYPES: dict[str, Literal["i", "q"]] = {"I32": "i", "I64": "q"}


class StoreError(ValueError):
    """A text store cannot be built, read or used with this model."""


def fingerprint(tokenizer: Path) -> str:
    """Return the name of a tokenizer: a hash of its file."""
    return hashlib.sha256(tokenizer.read_bytes()).hexdigest()


def build_store(texts: Iterable[Sequence[int]], tokenizer: str, file: Path) -> int:
    """Index texts, as token ids, and write the store. Takes some 50 bytes of memory for each token.

    A file that is there is replaced at once: engines that have it mapped keep what they have. tokenizer: see
    fingerprint. Returns the number of tokens. Raises StoreError for texts without tokens, OSError.
    """
    tokens = array("I")
    for text in texts:
        if len(text):
            tokens.extend(text)
            tokens.append(SEPARATOR)
    if not tokens:
        raise StoreError("the texts have no tokens")
    packed = pack_reversed(np.frombuffer(tokens, dtype=np.uint32)[:-1])
    order: npt.NDArray[Any] = sort_contexts(packed)
    if len(order) < 2**31:
        order = order.astype(np.int32)
    arrays: dict[str, npt.NDArray[Any]] = {"order": order, "reversed": packed.view(np.uint8)}
    with tempfile.TemporaryDirectory(prefix=".store-", dir=file.parent) as folder:
        part = Path(folder) / "store"
        try:
            save_file(arrays, part, metadata={"kind": _KIND, "tokenizer": tokenizer})
        except SafetensorError as error:
            raise StoreError(f"{file} cannot be written: {error}") from None
        part.chmod(0o644)  # safetensors creates it readable by its owner only
        os.replace(part, file)
    return len(order)


class TextStore:
    """A store, memory-mapped: the system loads what is read, and engines on a machine share it.

    num_tokens: of its texts.
    """

    def __init__(self, file: Path, tokenizer: str) -> None:
        """tokenizer: fingerprint of the model's. Raises StoreError for a file that is none, or of another tokenizer."""
        try:
            with file.open("rb") as opened:
                self._memory = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
            parts, kind, made_by = _read_header(self._memory)
        except OSError as error:
            raise StoreError(f"{file}: {error.strerror or error}") from error
        except (ValueError, KeyError, TypeError, RecursionError, struct.error):
            raise StoreError(f"{file}: it is not a text store; `magicdec store build` makes one") from None
        if kind != _KIND:
            raise StoreError(f"{file}: it is not a text store that this version reads; build it again")
        if made_by != tokenizer:
            raise StoreError(f"{file}: it was built with another tokenizer than the model's; build it with --model")
        self.texts = ContextArray(parts["reversed"], parts["order"])
        self.num_tokens = len(self.texts)

    def matches(self, context: Sequence[int], minimum: int, limit: int) -> Iterator[tuple[int, int]]:
        """See ContextArray.matches."""
        return self.texts.matches(context, minimum, limit)

    def following(self, first: int, count: int) -> tuple[int, ...]:
        """Return up to `count` tokens from a position on, as far as its text goes."""
        found = self.texts.tokens(first, count)
        return found[: found.index(SEPARATOR)] if SEPARATOR in found else found


def _read_header(memory: mmap.mmap) -> tuple[dict[str, memoryview], str, str]:
    """Return the arrays, the kind of file and its tokenizer. Raises ValueError, KeyError, TypeError, struct.error."""
    (size,) = struct.unpack("<Q", memory[:8])
    header = json.loads(memory[8 : 8 + size])
    whole, first = memoryview(memory), 8 + size
    parts: dict[str, memoryview] = {}
    for name in ("reversed", "order"):
        begin, end = header[name]["data_offsets"]
        part = whole[first + begin : first + end]
        if len(part) != end - begin:
            raise ValueError("the file is cut off")
        parts[name] = part
    parts["order"] = parts["order"].cast(_ORDER_TYPES[header["order"]["dtype"]])
    if parts["reversed"].nbytes != 4 * len(parts["order"]):
        raise ValueError("its arrays differ in length")
    return parts, header["__metadata__"]["kind"], header["__metadata__"]["tokenizer"]
