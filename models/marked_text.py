"""Text in which marks tell names that clients wrote from special tokens. Free of torch."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers

_ALIAS_CHARS = range(0xF0000, 0xFFFFE)
"""Private-use characters, which no normalizer changes."""


@dataclass(frozen=True, slots=True)
class MarkedText:
    """A text in which some characters are marks that stand for others. marks: the character of each mark."""

    text: str
    marks: Mapping[str, str]

    @property
    def plain(self) -> str:
        """The text without marks."""
        return self.text.translate({ord(mark): char for mark, char in self.marks.items()})


class MarkedEncoder:
    """Encodes text in which the names of special tokens are either those tokens or plain text.

    It replaces the names that are tokens by aliases, added tokens of another tokenizer, to which names are plain text.
    An alias is random, so that no client can write one.
    """

    def __init__(self, library: tokenizers.Tokenizer, special_names: Mapping[int, str]) -> None:
        """library: the tokenizer to encode as. special_names: of its special tokens, by id."""
        added = library.get_added_tokens_decoder()
        # Finds added tokens; all text between two of them is one unknown token.
        self._finder = tokenizers.Tokenizer(tokenizers.models.WordLevel({"": 0}, unk_token=""))
        if library.normalizer is not None:
            self._finder.normalizer = library.normalizer
        self._finder.add_tokens(list(added.values()))
        described = json.loads(library.to_str())
        for token in described["added_tokens"]:
            token["special"] = token["special"] or token["id"] in special_names
        self._plain = tokenizers.Tokenizer.from_str(json.dumps(described))
        self._plain.encode_special_tokens = True
        self._id_of = {name: id for id, name in special_names.items()}
        self._ids: dict[int, list[int]] = {}
        (self._separator,) = self._add([([], {"normalized": False})])
        # Some models spell a name with its special token even so; a separator, which is no token, divides those.
        self._spelt = {}
        for id, name in special_names.items():
            if id in self._plain.encode(name, add_special_tokens=False).ids:
                self._spelt[name] = f"{name[:1]}{self._separator}{name[1:]}"
                if id != _unknown_id(described):
                    parts = self._plain.encode(self._spelt[name], add_special_tokens=False).ids
                    self._ids[id] = [part for part in parts if part not in self._ids]
        flags = [
            {flag: getattr(added[id], flag) for flag in ("lstrip", "rstrip", "normalized")} for id in special_names
        ]
        aliases = self._add([([id], own) for id, own in zip(special_names, flags, strict=True)])
        self._aliases = dict(zip(special_names.values(), aliases, strict=True))

    def find_names(self, text: MarkedText) -> list[tuple[int, int]]:
        """Find the names of special tokens without marks: the token of each, and the place where it ends."""
        (found,) = self._finder.encode_batch([text.text], add_special_tokens=False)
        names = [(self._finder.id_to_token(id), place[1]) for id, place in zip(found.ids, found.offsets, strict=True)]
        return [(self._id_of[name], end) for name, end in names if name in self._id_of]

    def encode(self, text: MarkedText, add_special_tokens: bool) -> list[int]:
        """See Tokenizer.encode_marked."""
        (found,) = self._finder.encode_batch([text.text], add_special_tokens=False)
        pieces, end = [], 0
        for id, (first, last) in zip(found.ids, found.offsets, strict=True):
            name = self._finder.id_to_token(id)  # `tokens` has it with the spaces that it takes
            if name in self._aliases and (place := text.text.find(name, first, last)) >= 0:
                pieces += [text.text[end:place], self._aliases[name]]
                end = place + len(name)
        aliased = MarkedText("".join([*pieces, text.text[end:]]), text.marks).plain
        for name, spelt in self._spelt.items():
            aliased = aliased.replace(name, spelt)
        (encoding,) = self._plain.encode_batch_fast([aliased], add_special_tokens=add_special_tokens)
        added = encoding.special_tokens_mask
        return [token for i, id in enumerate(encoding.ids) for token in ([id] if added[i] else self._ids.get(id, [id]))]

    def _add(self, tokens: Sequence[tuple[list[int], dict[str, bool]]]) -> list[str]:
        """Add tokens that stand for ids, with their flags. Returns their texts. All at once: each call makes an index
        of all added tokens, of which some models have thousands."""
        aliases = ["".join(chr(secrets.choice(_ALIAS_CHARS)) for _ in range(8)) for _ in tokens]
        self._plain.add_tokens(
            [tokenizers.AddedToken(alias, **flags) for alias, (_, flags) in zip(aliases, tokens, strict=True)]
        )
        for alias, (ids, _) in zip(aliases, tokens, strict=True):
            new = self._plain.token_to_id(alias)
            assert new is not None
            self._ids[new] = ids
        return aliases


def _unknown_id(described: dict[str, Any]) -> int | None:
    """Return the token that stands for text without tokens. described: the content of a tokenizer.json."""
    model = described["model"]
    name = model.get("unk_token")
    found: int | None = model.get("unk_id") if name is None else model["vocab"].get(name)
    return found
