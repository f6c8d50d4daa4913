"""Marks in client text: special tokens come from the template alone, whatever the messages contain.

Before a template is rendered, a character of each special token's name in the messages is replaced by a mark, a
private-use character that occurs nowhere else. Templates can still trim, cut, compare and join the messages. In the
rendered text, the marks tell the names that clients wrote from those of the template.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from server.errors import ApiError

_MARKS = range(0x100000, 0x10FFFE)
"""Private-use characters; the tokenizer's aliases are others."""


class NameMarker:
    """Marks the names of special tokens, in messages for one template."""

    def __init__(self, names: Collection[str], literals: Collection[str]) -> None:
        """names: of the special tokens. literals: the texts in the template."""
        names = [name for name in names if name]
        alternatives = "|".join(map(re.escape, sorted(names)))
        self._names = re.compile(f"(?={alternatives})") if names else None  # finds names that overlap
        self._beginnings = {name[:end] for name in names for end in range(1, len(name))}
        self._longest = max(map(len, self._beginnings), default=0)
        endings = {name[start:] for name in names for start in range(1, len(name))}
        # A template may write the beginning of a name, such as "<|", before a message.
        self._endings = endings if any(self._has_beginning(literal) for literal in literals) else set()
        self._taken = set("".join(literals))

    def mark(self, messages: Sequence[dict[str, str]]) -> tuple[list[dict[str, str]], dict[str, str]]:
        """Replace characters of the messages, but for their roles, which clients cannot choose freely.

        Returns the messages, and the character that each mark stands for. Raises ApiError.
        """
        places = [
            {key: found for key, text in message.items() if key != "role" and (found := self._places(text))}
            for message in messages
        ]
        pairs = list(zip(messages, places, strict=True))
        chars = {message[key][i] for message, mine in pairs for key, found in mine.items() for i in found}
        if not chars:
            return list(messages), {}
        taken = self._taken.union(*(text for message in messages for text in message.values()))
        free = (char for char in map(chr, _MARKS) if char not in taken)
        mark_of = dict(zip(sorted(chars), free, strict=False))
        if len(mark_of) < len(chars):
            raise ApiError("messages: too many different private-use characters (U+100000 and above)", param="messages")
        marked = []
        for message, mine in pairs:
            marked.append(dict(message))
            for key, found in mine.items():
                text = list(message[key])
                for i in found:
                    text[i] = mark_of[text[i]]
                marked[-1][key] = "".join(text)
        return marked, {mark: char for char, mark in mark_of.items()}

    def _places(self, text: str) -> set[int]:
        """Find the characters to mark: the first of each name, and of each part of one that other text may complete."""
        if self._names is None:
            return set()
        found = {match.start() for match in self._names.finditer(text)}
        for whole in (text, text.rstrip()):
            last = range(max(0, len(whole) - self._longest), len(whole))
            found |= {i for i in last if whole[i:] in self._beginnings}
        own = text.strip()
        if own and any(own.startswith(ending) or ending.startswith(own) for ending in self._endings):
            found.add(len(text) - len(text.lstrip()))
        return found

    def _has_beginning(self, literal: str) -> bool:
        return any(literal.endswith(beginning) for beginning in self._beginnings)
