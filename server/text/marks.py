"""Marks in client text: special tokens come from the template alone, whatever the messages contain.

A conversation is rendered twice: as it is, and with marks, private-use characters that occur nowhere else, in the place
of client characters that names of special tokens are made of. In the second text, a name without a mark is the
template's; a name that a client wrote, in whole or in part, has marks, whatever the template did with the messages.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence

from server.errors import ApiError

_MARKS = range(0x100000, 0x10FFFE)
"""Private-use characters; the tokenizer's aliases are others."""


class NameMarker:
    """Marks the characters of special tokens' names, in messages for one template."""

    def __init__(
        self, names: Collection[str], literals: Collection[str], normalize: Callable[[str], str] = str
    ) -> None:
        """names: of the special tokens. literals: the strings in the template's expressions. normalize: what the
        tokenizer does to text before it looks for names."""
        self._names = [name for name in names if name]
        self._normalize = normalize
        letters = {"&", *"".join(self._names)}  # & begins entities, which jinja's striptags resolves
        # Fewer characters disturb fewer templates, and nearly every part of a name has one of these.
        signs = {"&", *(char for name in self._names for char in (_signs(name) or name))}
        self._alphabets = [letters, signs] if self._names else [set(), set()]
        # A string with a part of a name, which other text may complete, is marked like all text.
        pairs = {name[i : i + 2] for name in self._names for i in range(len(name) - 1) if _signs(name[i : i + 2])}
        self._literals = [
            text
            for text in literals
            if len(text) > 1
            and not any(pair in text for pair in pairs)
            and not any(text in name for name in self._names)
        ]
        self._taken = set("".join(literals))

    def mark(self, messages: Sequence[dict[str, str]]) -> list[tuple[list[dict[str, str]], dict[str, str]]]:
        """Return versions of the messages with marks, and the character that each mark stands for; none if the messages
        have no character of a name. Raises ApiError.

        The first version marks all characters of names, the second one signs only. What a template looks for in
        messages, such as "</think>", has no marks. Roles, which clients cannot choose freely, have none either.
        """
        contents = self._contents(messages)
        used = set().union(*contents)
        forms = {char: {char, *char.lower(), *char.upper(), *self._normalize(char)} for char in used}
        marked_chars = [{char for char in used if forms[char] & alphabet} for alphabet in self._alphabets]
        if not marked_chars[0]:
            return []
        taken = self._taken | used
        free = (char for char in map(chr, _MARKS) if char not in taken)
        mark_of = dict(zip(sorted(marked_chars[0]), free, strict=False))
        if len(mark_of) < len(marked_chars[0]):
            raise ApiError("messages: too many different private-use characters (U+100000 and above)", param="messages")
        kept = self._find_literals(contents)
        versions = []
        for chars in marked_chars:
            table = {ord(char): mark_of[char] for char in chars}
            marked = [
                {key: text if key == "role" else _translate(text, table, kept) for key, text in message.items()}
                for message in messages
            ]
            versions.append((marked, {mark: char for char, mark in mark_of.items()}))
        return versions

    def has_names(self, messages: Sequence[dict[str, str]]) -> bool:
        """Whether the messages contain the name of a special token."""
        return any(name in text for text in self._contents(messages) for name in self._names)

    @staticmethod
    def _contents(messages: Sequence[dict[str, str]]) -> list[str]:
        return [text for message in messages for key, text in message.items() if key != "role"]

    def _find_literals(self, contents: Sequence[str]) -> re.Pattern[str] | None:
        """Return a pattern of the template's strings that are in the messages; None if there are none."""
        found = [literal for literal in self._literals if any(literal in text for text in contents)]
        longest_first = sorted(found, key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if found else None


def _signs(name: str) -> set[str]:
    return {char for char in name if not char.isalnum()}


def _translate(text: str, table: dict[int, str], kept: re.Pattern[str] | None) -> str:
    if kept is None:
        return text.translate(table)
    parts = kept.split(text)  # what the pattern matches is at odd places
    return "".join(part if i % 2 else part.translate(table) for i, part in enumerate(parts))
