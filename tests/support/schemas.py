"""Random JSON schemas with short instances, so that generation always ends."""

from __future__ import annotations

import random
from typing import Any

_NAMES = ("a", "id", "name", "größe", "x y", "items")


def random_schema(chance: random.Random, depth: int = 2) -> dict[str, Any]:
    """Build a random schema of an object."""
    return _object(chance, depth)


def _any(chance: random.Random, depth: int) -> dict[str, Any]:
    kinds = [_integer, _string, _enum, _constant, _optional]
    if depth:
        kinds += [_object, _array]
    return chance.choice(kinds)(chance, depth - 1)


def _object(chance: random.Random, depth: int) -> dict[str, Any]:
    names = chance.sample(_NAMES, chance.randint(1, 3))
    required = [name for name in names if chance.random() < 0.8]
    properties = {name: _any(chance, depth) for name in names}
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _array(chance: random.Random, depth: int) -> dict[str, Any]:
    least = chance.randint(0, 1)
    return {"type": "array", "items": _any(chance, depth), "minItems": least, "maxItems": least + chance.randint(0, 2)}


def _integer(chance: random.Random, depth: int) -> dict[str, Any]:
    least = chance.randint(-20, 20)
    return {"type": "integer", "minimum": least, "maximum": least + chance.choice([0, 5, 1000])}


def _string(chance: random.Random, depth: int) -> dict[str, Any]:
    if chance.random() < 0.3:
        return {"type": "string", "pattern": chance.choice(["^[a-c]{1,4}$", "^(yes|no)$", "^\\d\\d-\\d\\d$"])}
    return {"type": "string", "maxLength": chance.randint(0, 6)}


def _enum(chance: random.Random, depth: int) -> dict[str, Any]:
    return {"enum": chance.sample(["red", "green", 1, None, True, "ü", ""], chance.randint(1, 4))}


def _constant(chance: random.Random, depth: int) -> dict[str, Any]:
    return {"const": chance.choice(["fixed", 0, False])}


def _optional(chance: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [{"type": "null"}, _integer(chance, depth), {"type": "boolean"}]}
