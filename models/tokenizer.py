"""Tokenizer of a model directory (tokenizer.json), and incremental detokenization. Free of torch."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from models.files.chat_template_files import DEFAULT, WITH_TOOLS, read_chat_templates
from models.files.json_values import ModelError, describe_no_directory
from models.files.special_tokens import read_special_names, read_special_tokens
from models.files.tokenizer_source import read_tokenizer_source
from models.marked_text import MarkedEncoder, MarkedText

REPLACEMENT = "\ufffd"
_LONGEST_INCOMPLETE = 3
"""Largest number of bytes of an incomplete UTF-8 character."""
_WINDOW = 16
"""Largest number of tokens that an IncrementalDecoder looks back; enough for any character split over byte tokens."""
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenizerError(ValueError):
    """A tokenizer file is missing or unreadable; the message names it."""


class Tokenizer:
    """A model's tokenizer, its special tokens and its chat template.

    Thread-safe: encode and decode may be called from any thread.

    special_tokens: text of each special token, by name (bos_token and the like), as its files name them.
    bos_token, eos_token: those two, None if the model has none; likewise their ids.
    chat_template: jinja2 source, None if the model has none. tool_template: of chats with tools; None: the same.
    """

    def __init__(self, path: str | Path) -> None:
        """path: a model directory. Raises TokenizerError."""
        directory = Path(path)
        source = _read(directory)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(source)
            decoder = json.loads(source).get("decoder") or {}
            parts = [decoder, *decoder.get("decoders", [])]
            is_byte_level = any(part.get("type") == "ByteLevel" for part in parts)
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"{directory / 'tokenizer.json'}: not a tokenizer: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        _keep_spaces(self._tokenizer.post_processor)
        added = self._tokenizer.get_added_tokens_decoder()
        self._added = frozenset(added)
        self._special_names = {id: token.content for id, token in added.items() if token.special}
        self._bytes_of = _byte_alphabet() if is_byte_level else None
        try:
            self.special_tokens = read_special_tokens(directory, self._has_token)
            templates = read_chat_templates(directory)
        except ModelError as error:
            raise TokenizerError(str(error)) from None
        self.chat_template, self.tool_template = map(templates.get, (DEFAULT, WITH_TOOLS))
        self.bos_token, self.eos_token = map(self.special_tokens.get, ("bos_token", "eos_token"))
        named = {*self.special_tokens.values(), *read_special_names(directory)}
        # Those that any file calls special, by id.
        self._protected = self._special_names | {
            id: token.content for id, token in added.items() if token.content in named
        }

    @property
    def vocab_size(self) -> int:
        """Number of tokens that have a text; a model's embedding may have more rows."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def special_names(self) -> frozenset[str]:
        """Texts that are encoded as special tokens."""
        return frozenset(self._protected.values())

    def normalize(self, text: str) -> str:
        """Return `text` as the tokenizer sees it where it looks for tokens whose names are normalized."""
        normalizer = self._tokenizer.normalizer
        return text if normalizer is None else normalizer.normalize_str(text)

    @property
    def names_in_grammars(self) -> dict[str, int]:
        """Texts that the grammar compiler takes for tokens, and their ids: special tokens, and added ones in angle
        brackets."""
        added = {id: token.content for id, token in self._tokenizer.get_added_tokens_decoder().items()}
        bracketed = {id: name for id, name in added.items() if name.startswith("<") and name.endswith(">")}
        return {name: id for id, name in (self._protected | bracketed).items()}

    @property
    def bos_token_id(self) -> int | None:
        return None if self.bos_token is None else self._tokenizer.token_to_id(self.bos_token)

    @property
    def eos_token_id(self) -> int | None:
        return None if self.eos_token is None else self._tokenizer.token_to_id(self.eos_token)

    def ids_of(self, names: Collection[str]) -> frozenset[int]:
        """Return the ids of those names that are a token."""
        return frozenset(id for name in names if (id := self.id_of(name)) is not None)

    def id_of(self, name: str) -> int | None:
        """Return the id of the token with this name; None if there is none."""
        return self._tokenizer.token_to_id(name)

    def _has_token(self, text: str) -> bool:
        return self.id_of(text) is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Encode `text`, which must be encodable as UTF-8 (no lone surrogates)."""
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_batch(self, texts: list[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Encode each text. Other threads can run meanwhile (the library's call for a single text blocks them)."""
        found = self._tokenizer.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in found]

    def encode_with_offsets(self, text: str, add_special_tokens: bool = True) -> tuple[list[int], list[int]]:
        """Encode `text`. Also returns the offset in `text` at which each token begins; tokens that are added to the
        text take none of it."""
        (encoding,) = self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)
        offsets, end = [], 0
        for is_added, (first, last) in zip(encoding.special_tokens_mask, encoding.offsets, strict=True):
            offsets.append(end if is_added else first)
            end = max(end, last)
        return encoding.ids, offsets

    def encode_marked(self, text: MarkedText, add_special_tokens: bool = True) -> list[int]:
        """Encode a text in which the names of special tokens that contain a mark are plain text. All else is encoded as
        if the text had the characters themselves."""
        return self._marked_encoder.encode(text, add_special_tokens)

    def encode_guarded(
        self, text: str, marked: MarkedText, is_faithful: bool = True, add_special_tokens: bool = True
    ) -> list[int]:
        """Encode `text` as `encode` does, unless that makes other special tokens than `marked` has names without marks;
        then as `encode_marked` does.

        marked: the same text, unless it is not `is_faithful`.
        """
        (encoding,) = self._tokenizer.encode_batch([text], add_special_tokens=False)
        pairs = zip(encoding.ids, encoding.offsets, strict=True)
        made = [(id, place[1]) for id, place in pairs if id in self._protected]
        written = self._marked_encoder.find_names(marked)
        if not is_faithful:  # places differ
            made, written = ([(id, 0) for id, _ in found] for found in (made, written))
        if made != written:
            return self.encode_marked(marked, add_special_tokens)
        return self.encode(text) if add_special_tokens else encoding.ids

    @cached_property
    def _marked_encoder(self) -> MarkedEncoder:
        return MarkedEncoder(self._tokenizer, self._protected)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Decode ids. Those without a token decode to nothing; bytes that are not UTF-8 decode to U+FFFD."""
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    @property
    def byte_level(self) -> bool:
        """Whether every token is a sequence of bytes, and a text is its tokens' bytes joined."""
        return self._bytes_of is not None

    def is_skipped(self, token: int, skip_special_tokens: bool = True) -> bool:
        """Whether `decode` drops this token before it decodes the others."""
        if skip_special_tokens and token in self._special_names:
            return True
        return self._tokenizer.id_to_token(token) is None

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of one token, which may be part of a character."""
        piece = self._tokenizer.id_to_token(token)
        if piece is None:
            return b""
        if self._bytes_of is not None:
            if token not in self._added and all(char in self._bytes_of for char in piece):
                return bytes(self._bytes_of[char] for char in piece)
            return piece.encode()
        if match := _BYTE_TOKEN.fullmatch(piece):
            return bytes([int(match[1], 16)])
        return piece.replace("\u2581", " ").encode()


class IncrementalDecoder:
    """Decodes a growing sequence of tokens into text that is only ever appended to.

    A character split over several tokens appears with its last byte. For byte-level tokenizers the pieces that `push`
    and `flush` return join to exactly `tokenizer.decode(all tokens)`; byte-fallback tokenizers agree wherever the
    tokens are valid UTF-8. context: tokens before the first one; their text is not returned, but some tokenizers write
    a word's leading space only when something precedes it.

    The work per token is bounded, even after any number of invalid bytes (the tokenizers library's DecodeStream decodes
    all of them again for each token).
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_special_tokens: bool = True,
        context: Sequence[int] = (),
        shown: frozenset[int] = frozenset(),
    ) -> None:
        """shown: special tokens that are not skipped."""
        self._tokenizer = tokenizer
        self._skips = skip_special_tokens
        self._shown = shown
        self._decodes_all = not skip_special_tokens or bool(shown)
        # decode(window)[:given] is already returned; window[:settled] ends at a character's end.
        self._window = [
            token for token in context[-(_WINDOW // 2) :] if not tokenizer.is_skipped(token, skip_special_tokens)
        ]
        text = self._text()
        if text.endswith(REPLACEMENT):
            self._window, text = [], ""
        self._settled, self._given = len(self._window), len(text)

    def push(self, token: int) -> str:
        """Append `token`. Returns the text that is now certain: often its own piece, sometimes empty."""
        if self._tokenizer.is_skipped(token, self._skips) and token not in self._shown:
            return ""
        self._window.append(token)
        text = self._text()
        overflow = len(self._window) > _WINDOW
        certain = len(text) - self._undecided(text, _LONGEST_INCOMPLETE if overflow else _WINDOW)
        piece = text[self._given : certain]
        self._given = max(self._given, certain)
        if piece and certain == len(text):
            # Keep the tokens of the last piece: the text of the next one may depend on them.
            self._drop(self._settled, 0)
            self._settled = len(self._window)
        elif overflow:
            self._drop(_WINDOW // 2, len(text) - certain)
        return piece

    def owed(self, token: int, piece: str) -> int:
        """Count the characters of `piece`, the result of `push(token)`, that belong to earlier tokens: bytes that only
        this token shows to be no character."""
        broken = len(piece) - len(piece.lstrip(REPLACEMENT))
        return 0 if broken and REPLACEMENT in self._tokenizer.token_bytes(token).decode(errors="replace") else broken

    def flush(self) -> str:
        """Return the text held back so far; call at the end of the sequence."""
        text = self._text()
        piece = text[self._given :]
        self._given = max(self._given, len(text))
        return piece

    def _text(self) -> str:
        return self._tokenizer.decode(self._window, not self._decodes_all)

    def _undecided(self, text: str, max_bytes: int) -> int:
        """Count the characters at the end that further bytes may change.

        In a byte-level text that is at most one; with byte fallback, all of a run of bytes that is not UTF-8 yet.
        """
        max_bytes = 1 if self._tokenizer.byte_level else max_bytes
        count = 0
        while count < max_bytes and text.endswith(REPLACEMENT, 0, len(text) - count):
            count += 1
        return count

    def _drop(self, tokens: int, undecided: int) -> None:
        del self._window[:tokens]
        self._settled = max(0, self._settled - tokens)
        self._given = max(0, len(self._text()) - undecided)


def _keep_spaces(processor: Any) -> None:
    """Make offsets of tokens include their spaces. processor: a tokenizer's post-processor, or None."""
    if hasattr(processor, "trim_offsets"):
        processor.trim_offsets = False
    elif isinstance(processor, tokenizers.processors.Sequence):
        parts: Any = processor  # it is iterable, which its stubs do not say
        for part in parts:
            _keep_spaces(part)


def _byte_alphabet() -> dict[str, int]:
    """Map the characters of byte-level vocabularies to bytes: its own for a printable byte, others from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _read(directory: Path) -> str:
    path = directory / "tokenizer.json"
    if not directory.is_dir():
        raise TokenizerError(describe_no_directory(directory))
    if not path.is_file():
        raise TokenizerError(f"{directory}: no tokenizer.json")
    try:
        return read_tokenizer_source(directory).text
    except ModelError as error:
        raise TokenizerError(str(error)) from None
