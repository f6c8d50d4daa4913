"""Grammars made of others, in the compiler's format: a list of grammars, which refer to each other by name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from server.text.structured import Grammar


def compose(rules: Sequence[str], parts: dict[str, Grammar]) -> Grammar:
    """Return the grammar with these rules, which refer to each part as @name. All else is that of the first part."""
    grammars: list[dict[str, Any]] = [{"lark_grammar": "\n".join(rules)}]
    for name, part in parts.items():
        first, *others = grammars_of(part)
        grammars += [{**first, "name": name}, *others]
    return replace(next(iter(parts.values())), text=json.dumps({"grammars": grammars}))


def grammars_of(grammar: Grammar) -> list[dict[str, Any]]:
    """List the grammars that a grammar consists of; the first one is its start."""
    if not grammar.text.startswith("{"):
        return [{"lark_grammar": grammar.text}]
    found: list[dict[str, Any]] = json.loads(grammar.text)["grammars"]
    return found
