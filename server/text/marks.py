"""Marks in client text: special tokens come from the template alone, whatever the messages contain.

A conversation is rendered twice: as it is, and with marks, private-use characters that occur nowhere else, in the place
of client characters that names of special tokens are made of. In the second text, a name without a mark is the
template's; a name that a client wrote, in whole or in part, has marks, whatever the template did with the messages.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

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
        self._pairs = pairs = {
            name[i : i + 2] for name in self._names for i in range(len(name) - 1) if _signs(name[i : i + 2])
        }
        self._inner = {name[1:-1] for name in self._names}
        self._literals = [
            text
            for text in literals
            if len(text) > 1
            and not any(pair in text for pair in pairs)
            and not any(text in name for name in self._names)
        ]
        self._taken = set("".join(literals))

    def mark(self, variables: Mapping[str, Any]) -> list[tuple[dict[str, Any], dict[str, str]]]:
        """Return versions of a template's variables with marks, and the character that each mark stands for; none if
        they have no character of a name. Raises ApiError.

        The first version marks all characters of names, the second one signs only. What a template looks for in
        messages, such as "</think>", has no marks. Roles, which clients cannot choose freely, have none either, nor
        have keys of objects, unless a name may be made of them."""
        client = _without_roles(variables)
        texts = [*texts_of(client), *filter(self._is_part, keys_of(client))]
        used = set().union(*texts)
        forms = {char: {char, *char.lower(), *char.upper(), *self._normalize(char)} for char in used}
        marked_chars = [{char for char in used if forms[char] & alphabet} for alphabet in self._alphabets]
        if not marked_chars[0]:
            return []
        taken = self._taken | used
        free = (char for char in map(chr, _MARKS) if char not in taken)
        mark_of = dict(zip(sorted(marked_chars[0]), free, strict=False))
        if len(mark_of) < len(marked_chars[0]):
            raise ApiError("messages: too many different private-use characters (U+100000 and above)", param="messages")
        kept = self._find_literals(texts)
        versions = []
        for chars in marked_chars:
            table = {ord(char): mark_of[char] for char in chars}
            marked = self._translated(variables, table, kept)
            for message, original in zip(marked["messages"], variables["messages"], strict=True):
                message["role"] = original["role"]
            versions.append((marked, {mark: char for char, mark in mark_of.items()}))
        return versions

    def has_names(self, variables: Mapping[str, Any]) -> bool:
        """Whether the variables contain the name of a special token."""
        client = _without_roles(variables)
        texts = [*texts_of(client), *keys_of(client)]
        return any(name in text for text in texts for name in self._names)

    def _is_part(self, key: str) -> bool:
        """Whether the name of a special token may be made of this key and of what a template writes beside it."""
        return any(pair in key for pair in self._pairs) or key in self._inner

    def _translated(self, value: Any, table: Mapping[int, str], kept: re.Pattern[str] | None) -> Any:
        if isinstance(value, str):
            return _translate(value, table, kept)
        if isinstance(value, list | tuple):
            return [self._translated(each, table, kept) for each in value]
        if not isinstance(value, Mapping):
            return value
        return {
            key.translate(table) if self._is_part(key) else key: self._translated(each, table, kept)
            for key, each in value.items()
        }

    def _find_literals(self, contents: Sequence[str]) -> re.Pattern[str] | None:
        """Return a pattern of the template's strings that are in the messages; None if there are none."""
        found = [literal for literal in self._literals if any(literal in text for text in contents)]
        longest_first = sorted(found, key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if found else None


def texts_of(value: Any) -> Iterator[str]:
    """List the texts in a template's variables."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from texts_of(each)
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from texts_of(each)


def keys_of(value: Any) -> Iterator[str]:
    """List the keys of objects in a template's variables."""
    if isinstance(value, list | tuple):
        for each in value:
            yield from keys_of(each)
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield key
            yield from keys_of(each)


def _without_roles(variables: Mapping[str, Any]) -> dict[str, Any]:
    messages = [{key: value for key, value in each.items() if key != "role"} for each in variables["messages"]]
    return {**variables, "messages": messages}


def _signs(name: str) -> set[str]:
    return {char for char in name if not char.isalnum()}


def _translate(text: str, table: Mapping[int, str], kept: re.Pattern[str] | None) -> str:
    if kept is None:
        return text.translate(table)
    parts = kept.split(text)  # what the pattern matches is at odd places
    return "".join(part if i % 2 else part.translate(table) for i, part in enumerate(parts))
