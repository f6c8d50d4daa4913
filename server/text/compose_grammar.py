"""Grammars made of others, in the compiler's format: a list of grammars, which refer to each other by name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from server.text.structured import Grammar


def compose(rules: Sequence[str], name: str, part: Grammar) -> str:
    """Return the text of a grammar with these rules, which refer to another grammar as @name."""
    first, *others = grammars_of(part)
    grammars = [{"lark_grammar": "\n".join(rules)}, {**first, "name": name}, *others]
    return json.dumps({"grammars": grammars})


def grammars_of(grammar: Grammar) -> list[dict[str, Any]]:
    """List the grammars that a grammar consists of; the first one is its start."""
    if not grammar.text.startswith("{"):
        return [{"lark_grammar": grammar.text}]
    found: list[dict[str, Any]] = json.loads(grammar.text)["grammars"]
    return found
