"""Refuse texts, regexes and grammars that prescribe the name of a special token: the compiler would take it for that.

A regex has many ways to write a name, and those that clients use are found; the engine sees to the others, and
so it does where a name comes together from several parts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable

from server.errors import ApiError

_CODE = r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|[xuU]\{([0-9a-fA-F]{1,8})\})"
_CONTROLS = {"a": "\a", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}
_ESCAPE = re.compile(_CODE + r"|\\(.)", re.DOTALL)
_ONE = re.compile(r"\[(?:\\(\W)|([^\\^]))\]|\(\?(?:P?<\w+>|[a-zA-Z-]*:?)|\{1(?:,1)?\}|" + _ESCAPE.pattern, re.DOTALL)
"""A set of one character, the beginning of a group, a repetition that is none, or an escape, in a regex."""
_SETS_AND_GROUPS = frozenset("\\[]()")
_STRING_OR_REGEX = re.compile(r'"(?:[^"\\\n]|\\.)*"|/(?:[^/\\\n]|\\.)+/')
"""Strings and regexes of a grammar, as they are written."""


def check_names(
    param: str, part: str, texts: Iterable[str], special_names: Collection[str], regexes: Iterable[str] = ()
) -> None:
    """Raise ApiError if one of `texts` or `regexes`, which the grammar prescribes, contains the name of a special
    token."""
    together = "\0".join(texts)
    plain = "\0".join(map(_plain, regexes))
    stripped: dict[frozenset[str], str] = {}
    for name in special_names:
        marks = _SETS_AND_GROUPS.difference(name)  # a name that is in brackets is told from the word by them
        if plain and marks not in stripped:
            stripped[marks] = plain.translate(dict.fromkeys(map(ord, marks)))
        if name in together or (plain and name in stripped[marks]):
            raise ApiError(f"{param}: {part} contains the name of a special token, {name}", param=param)


def check_names_in_grammar(param: str, grammar: str, special_names: Collection[str]) -> None:
    """Raise ApiError if a string or regex in a grammar contains the name of a special token."""
    found = _STRING_OR_REGEX.findall(grammar)
    texts = [_unquoted(each) for each in found if each.startswith('"')]
    regexes = [each[1:-1] for each in found if each.startswith("/")]
    if "%json" in grammar:
        regexes += texts  # which may be patterns in a JSON schema
    check_names(param, "a string or regex of the grammar", texts, special_names, regexes)


def _unquoted(text: str) -> str:
    try:
        return str(json.loads(text))
    except ValueError:
        return _ESCAPE.sub(lambda found: _decoded(*found.groups()), text[1:-1])


def _plain(regex: str) -> str:
    """Return a regex with its escapes decoded, and without what stands for nothing."""
    return _ONE.sub(lambda found: found[1] or found[2] or _decoded(*found.groups()[2:]), regex)


def _decoded(x: str | None, u: str | None, long: str | None, braced: str | None, other: str | None) -> str:
    """Return what an escape stands for; each argument but one is None, or all are."""
    code = x or u or long or braced
    if code is not None:
        return chr(int(code, 16)) if int(code, 16) <= 0x10FFFF else ""
    return _CONTROLS.get(other, other) if other is not None else ""
