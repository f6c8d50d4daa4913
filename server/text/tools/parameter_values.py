"""Values of parameters that a model writes as plain text: their types, and their conversion to JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

_ALL = frozenset(("array", "boolean", "integer", "null", "number", "object", "string"))
_STRING = frozenset(("string",))
_PYTHON = {"True": "true", "False": "false", "None": "null"}
"""Python's spelling of values, which some models use."""
_MAX_DEPTH = 16
"""Depth to which schemas are read: they may refer to themselves."""


def schema_of(parameter: str, schema: Mapping[str, Any]) -> Any:
    """Return the schema of a parameter in a function's schema."""
    whole = resolve(schema, schema)
    properties = whole.get("properties")
    if isinstance(properties, Mapping) and parameter in properties:
        return properties[parameter]
    return whole.get("additionalProperties")


def resolve(schema: Any, root: Mapping[str, Any]) -> Mapping[str, Any]:
    """Follow a schema that is a reference into `root`; no such schema: an empty one."""
    for _ in range(_MAX_DEPTH):
        if not isinstance(schema, Mapping):
            break
        if not isinstance(schema.get("$ref"), str):
            return schema
        schema = referred(schema, root)
    return {}


def referred(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Any:
    """Return what the `$ref` of a schema, a text, refers to, which may be a reference itself."""
    found: Any = root
    for part in schema["$ref"].removeprefix("#").strip("/").split("/"):
        part = part.replace("~1", "/").replace("~0", "~")
        found = found.get(part) if isinstance(found, Mapping) and part else found
    return found


def is_text(schema: Any, root: Mapping[str, Any]) -> bool:
    """Whether a schema allows strings alone, so that their text needs no quotes."""
    return types_of(schema, root) == _STRING


def types_of(schema: Any, root: Mapping[str, Any]) -> frozenset[str]:
    """Return the types of values that a schema allows, as far as that is plain to see."""
    return _types(schema, root, {}, _MAX_DEPTH)


def _types(schema: Any, root: Mapping[str, Any], known: dict[int, frozenset[str]], depth: int) -> frozenset[str]:
    """known: types of schemas that were read, by identity; each is read once."""
    if not isinstance(schema, Mapping) or not depth:
        return _ALL
    if id(schema) in known:
        return known[id(schema)]
    found = known[id(schema)] = _ALL
    if "$ref" in schema:
        found &= _types(resolve(schema, root), root, known, depth - 1)
    named = schema.get("type")
    if isinstance(named, str | list):
        types = {named} if isinstance(named, str) else {each for each in named if isinstance(each, str)}
        found &= types | ({"integer"} if "number" in types else set())
    if "const" in schema:
        found &= {_type(schema["const"])}
    if isinstance(values := schema.get("enum"), list):
        found &= {_type(value) for value in values}
    for key in ("anyOf", "oneOf"):
        if isinstance(alternatives := schema.get(key), list):
            found &= {name for each in alternatives for name in _types(each, root, known, depth - 1)}
    if isinstance(parts := schema.get("allOf"), list):
        for each in parts:
            found &= _types(each, root, known, depth - 1)
    known[id(schema)] = found
    return found


def to_json(text: str, types: Iterable[str]) -> str:
    """Convert the text of a value. JSON of one of `types` stays as it is; any other text becomes a string, unless it is
    JSON where no string is allowed."""
    allowed = frozenset(types)
    if allowed != _STRING:
        stripped = text.strip()
        if "string" not in allowed:
            stripped = _PYTHON.get(stripped, stripped)
        try:
            found = _type(json.loads(stripped, parse_constant=_refuse))
        except (ValueError, RecursionError):
            found = ""
        if found in allowed or (found and "string" not in allowed):
            return stripped
    return quote(text)


def quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _type(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, float):
        return "integer" if value.is_integer() else "number"
    names = {int: "integer", str: "string", list: "array", dict: "object", type(None): "null"}
    return names[type(value)]


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
