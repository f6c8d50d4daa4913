"""Marks in client text: special tokens come from the template alone, whatever the messages contain.

A conversation is rendered twice: as it is, and with marks, private-use characters that occur nowhere else, in the place
of client characters that names of special tokens are made of. In the second text, a name without a mark is the
template's; a name that a client wrote, in whole or in part, has marks, whatever the template did with the messages.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from server.errors import ApiError

_MARKS = range(0x100000, 0x10FFFE)
"""Private-use characters; the tokenizer's aliases are others."""


class NameMarker:
    """Marks the characters of special tokens' names, in messages for one template."""

    def __init__(self, names: Collection[str], literals: Collection[str]) -> None:
        """names: of the special tokens. literals: the strings in the template's expressions."""
        self._names = [name for name in names if name]
        letters = set("".join(self._names))
        # Fewer characters disturb fewer templates, and nearly every part of a name has one of these.
        signs = {char for name in self._names for char in (_signs(name) or name)}
        self._alphabets = [letters, signs]
        self._literals = [text for text in literals if len(text) > 1 and not any(text in name for name in self._names)]
        self._taken = set("".join(literals))

    def mark(self, messages: Sequence[dict[str, str]]) -> list[tuple[list[dict[str, str]], dict[str, str]]]:
        """Return versions of the messages with marks, and the character that each mark stands for; none if the messages
        have no character of a name. Raises ApiError.

        The first version marks all characters of names, the second one signs only. What a template looks for in
        messages, such as "</think>", has no marks. Roles, which clients cannot choose freely, have none either.
        """
        contents = [text for message in messages for key, text in message.items() if key != "role"]
        used = set().union(*contents)
        if not used & self._alphabets[0]:
            return []
        taken = self._taken | used
        free = (char for char in map(chr, _MARKS) if char not in taken)
        mark_of = dict(zip(sorted(self._alphabets[0]), free, strict=False))
        if len(mark_of) < len(self._alphabets[0]):
            raise ApiError("messages: too many different private-use characters (U+100000 and above)", param="messages")
        kept = self._find_literals(contents)
        versions = []
        for alphabet in self._alphabets:
            table = {ord(char): mark_of[char] for char in used & alphabet}
            marked = [
                {key: text if key == "role" else _translate(text, table, kept) for key, text in message.items()}
                for message in messages
            ]
            versions.append((marked, {mark: char for char, mark in mark_of.items()}))
        return versions

    def _find_literals(self, contents: Sequence[str]) -> re.Pattern[str] | None:
        """Return a pattern of the template's strings in the messages; None if there are none, or they make a name."""
        found = [literal for literal in self._literals if any(literal in text for text in contents)]
        if not found:
            return None
        pattern = re.compile("(" + "|".join(map(re.escape, sorted(found, key=len, reverse=True))) + ")")
        joined = "".join(piece for text in contents for piece in pattern.findall(text))
        return None if any(name in joined for name in self._names) else pattern


def _signs(name: str) -> set[str]:
    return {char for char in name if not char.isalnum()}


def _translate(text: str, table: dict[int, str], kept: re.Pattern[str] | None) -> str:
    if kept is None:
        return text.translate(table)
    parts = kept.split(text)  # what the pattern matches is at odd places
    return "".join(part if i % 2 else part.translate(table) for i, part in enumerate(parts))
