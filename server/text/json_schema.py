"""Rewrite a client's JSON schema for the grammar compiler, which refuses keywords even where they constrain nothing.

The output still matches the client's schema: annotations and empty constraints are removed, constraints that the
compiler knows under another name are renamed, and all others are left for it to serve or to refuse.
"""

from __future__ import annotations

import copy
import json
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

FORMATS = frozenset(
    {
        *("date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uri", "uuid"),
        "unknown",  # enforces nothing
    }
)
"""Formats of strings that the compiler enforces. Any other is an annotation, as JSON Schema has it."""
ANNOTATIONS = frozenset(
    {
        *("$comment", "default", "deprecated", "description", "examples", "readOnly", "title", "writeOnly"),
        "x-guidance",  # the compiler's own settings, with which it would ignore keywords that it does not serve
    }
)
_SCHEMA = frozenset(
    {
        *("additionalItems", "additionalProperties", "contains", "else", "if", "items", "not", "propertyNames", "then"),
        *("unevaluatedItems", "unevaluatedProperties"),
    }
)
"""Keywords whose value is a schema."""
_SCHEMAS = frozenset(("allOf", "anyOf", "items", "oneOf", "prefixItems"))
"""Keywords whose value is a list of schemas."""
_NAMED_SCHEMAS = frozenset(("$defs", "definitions", "dependentSchemas", "patternProperties", "properties"))
"""Keywords whose value is an object of schemas."""
_COMBINING = frozenset(("allOf", "dependentSchemas", "if", "not", "unevaluatedProperties"))
"""Keywords with which several schemas describe one object."""
_ELSEWHERE = frozenset(("$dynamicRef", "$ref", "anyOf", "oneOf"))
"""Keywords that describe the same object elsewhere, so that other keywords of objects beside them combine with that."""
_OF_OTHER_PROPERTIES = frozenset(("additionalProperties", "patternProperties", "propertyNames", "minProperties"))
"""Keywords beside `properties` that say something of an object's other properties."""
_OF_OBJECTS = _ELSEWHERE | _OF_OTHER_PROPERTIES | {"properties", "required"}
_LITERALS = frozenset(("const", "enum", "required"))
"""Keywords whose value, or whose list of values, the output contains as it is."""
_NUMBERS = frozenset(("const", "enum", "exclusiveMaximum", "exclusiveMinimum", "maximum", "minimum", "multipleOf"))
"""Keywords whose numbers bind the output."""
_MAX_INT64 = 2**63 - 1
"""Served as a maximum, though a float64 does not hold it: the compiler stops there by itself."""
_MAX_REPEAT = 2**31 - 1
"""Largest length in a regex; the compiler takes no more than twice this."""


def exceeds(schema: Any, limit: int) -> bool:
    """Whether the schema's JSON text surely has more than `limit` characters; a text is taken as it is. Counts no
    further than that."""
    count, work = 0, [schema]
    while work and count <= limit:
        node = work.pop()
        if isinstance(node, str | list | dict):
            count += len(node)  # an entry takes a character or more, besides its own ones
        if count <= limit and isinstance(node, list | dict):
            work += node
            if isinstance(node, dict):
                work += node.values()
    return count > limit


class Rewritten(NamedTuple):
    """A schema for the compiler.

    places: where each keyword occurs first, like #/properties/a. literals: texts that an output may have to
    contain: values and names of properties, in JSON. patterns: regexes that parts of it may have to match.
    """

    schema: Any
    places: dict[str, str]
    literals: list[str]
    patterns: list[str]


class UnservedSchemaError(Exception):
    """The compiler would take a schema for another one; the message says what for."""


def rewrite(schema: Any) -> Rewritten:
    """Rewrite a client's schema. Raises UnservedSchemaError."""
    root = copy.deepcopy(schema)
    places: dict[str, str] = {}
    work = deque([(root, "#")])
    while work:
        node, place = work.popleft()
        if not isinstance(node, dict):
            continue
        _drop_empty_constraints(node)
        if (moved := _list_property_names(node, root)) is not None:
            work.append((moved, f"{place}/additionalProperties"))
        _require_discriminator(node)
        for key, value in list(node.items()):
            places.setdefault(key, place)
            inner = f"{place}/{key}"
            if key in _SCHEMA:
                work.append((value, inner))
            if key in _SCHEMAS and isinstance(value, list):
                work += [(each, f"{inner}/{i}") for i, each in enumerate(value)]
            if key in _NAMED_SCHEMAS and isinstance(value, dict):
                work += [(each, f"{inner}/{name}") for name, each in value.items()]
    literals: list[str] = []
    patterns: list[str] = []
    for node in _objects(root):  # those too that only a reference reaches
        for key, value in node.items():
            if key in _LITERALS:
                literals.append(json.dumps(value, ensure_ascii=False))
            elif key == "properties" and isinstance(value, dict):
                literals.append(json.dumps(list(value), ensure_ascii=False))
            elif key == "pattern" and isinstance(value, str):
                patterns.append(value)
            elif key == "patternProperties" and isinstance(value, dict):
                patterns += value
            if key in _NUMBERS:
                _check_numbers(key, value)
    return Rewritten(root, places, literals, patterns)


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """Yield all objects in a JSON value."""
    work = [value]
    while work:
        node = work.pop()
        if isinstance(node, dict):
            yield node
            work += node.values()
        elif isinstance(node, list):
            work += node


def _check_numbers(key: str, value: Any) -> None:
    """Raise UnservedSchemaError if a number in a keyword's value is none that the compiler holds: a float64."""
    work = [value]
    while work:
        node = work.pop()
        if isinstance(node, int) and not _is_held(node) and (key, node) != ("maximum", _MAX_INT64):
            raise UnservedSchemaError(f"the integer {_shortened(node)} in {key}, which a float64 does not hold")
        if isinstance(node, list | dict):
            work += node.values() if isinstance(node, dict) else node


def _is_held(number: int) -> bool:
    try:
        return int(float(number)) == number
    except OverflowError:
        return False


def _shortened(number: int) -> str:
    return str(number) if abs(number) < 10**40 else "of more than 40 digits"


def close_objects(schema: Any) -> None:
    """Make objects whose schema lists properties, and says nothing of others, have no others: an uncertain model would
    add some without end. Where schemas describe an object together, all are left as they are."""
    objects, work = [], [schema]
    while work:
        node = work.pop()
        if not isinstance(node, dict):
            continue
        if node.keys() & _COMBINING or (node.keys() & _ELSEWHERE and len(node.keys() & _OF_OBJECTS) > 1):
            return
        if "properties" in node and not node.keys() & _OF_OTHER_PROPERTIES and not _requires_others(node):
            objects.append(node)
        for key, value in node.items():
            if key in _SCHEMA:
                work.append(value)
            if key in _SCHEMAS and isinstance(value, list):
                work += value
            if key in _NAMED_SCHEMAS and isinstance(value, dict):
                work += value.values()
    for node in objects:
        node["additionalProperties"] = False


def _requires_others(node: dict[str, Any]) -> bool:
    """Whether an object has to have properties that it does not list."""
    required, listed = node.get("required"), node["properties"]
    return isinstance(required, list) and isinstance(listed, dict) and any(name not in listed for name in required)


def _drop_empty_constraints(node: dict[str, Any]) -> None:
    for key in node.keys() & ANNOTATIONS:
        del node[key]
    if _is_annotation("format", node.get("format")):
        del node["format"]
    if node.get("contains") is not None and node.get("minContains") == 0 and "maxContains" not in node:
        del node["contains"]
    if "contains" not in node:
        node.pop("minContains", None)
        node.pop("maxContains", None)
    if "if" not in node or all(_allows_all(node.get(key, True)) for key in ("then", "else")):
        for key in ("if", "then", "else"):
            node.pop(key, None)
    if node.get("not") is False:
        del node["not"]
    if node.get("uniqueItems") is False:
        del node["uniqueItems"]
    for key in ("unevaluatedItems", "unevaluatedProperties"):
        if _allows_all(node.get(key)):
            del node[key]
    for key in ("dependencies", "dependentRequired", "dependentSchemas"):
        value = node.get(key)
        if isinstance(value, dict) and all(each == [] or _allows_all(each) for each in value.values()):
            del node[key]


def _list_property_names(node: dict[str, Any], root: dict[str, Any]) -> Any:
    """Turn names of properties that are listed, or that match a pattern or have a length, into properties.

    Returns the schema that became a definition, if one did.
    """
    names = _but_string(_followed(node.get("propertyNames"), root))
    if _allows_all(names):
        del node["propertyNames"]
        return None
    if not isinstance(root.get("$defs", {}), dict):
        return None
    if not isinstance(names, dict) or node.keys() & {"properties", "patternProperties"}:
        return None
    constraints = _constraints(names)
    if (pattern := _pattern_of_length(constraints)) is not None:
        constraints = {"pattern": pattern}
    if len(constraints) != 1:
        return None
    ((keyword, value),) = constraints.items()
    listed = {"enum": value, "const": [value]}.get(keyword)
    values, moved = node.get("additionalProperties", True), None
    if isinstance(listed, list) and all(isinstance(name, str) for name in listed):
        if isinstance(values, dict):  # copies of it, nested in each other, would grow without bound
            values, moved = _define(values, root), values
        node["properties"] = dict.fromkeys(listed, values)
    elif keyword == "pattern" and isinstance(value, str):
        node["patternProperties"] = {value: values}
    else:
        return None
    node["additionalProperties"] = False
    del node["propertyNames"]
    return moved


def _require_discriminator(node: dict[str, Any]) -> None:
    """Require the property that tells alternatives apart; without it, they would not exclude each other."""
    discriminator, alternatives = node.get("discriminator"), node.get("oneOf")
    name = discriminator.get("propertyName") if isinstance(discriminator, dict) else None
    if not isinstance(name, str) or not isinstance(alternatives, list):
        return
    for each in alternatives:
        if isinstance(each, dict) and isinstance(required := each.get("required", []), list):
            each["required"] = [*(other for other in required if other != name), name]


def _pattern_of_length(constraints: Mapping[str, Any]) -> str | None:
    """Return a regex for strings of the length that `constraints` allow; None if they are not about the length alone,
    or not valid."""
    if not constraints or not constraints.keys() <= {"minLength", "maxLength"}:
        return None
    least, most = constraints.get("minLength", 0), constraints.get("maxLength", _MAX_REPEAT)
    if type(least) is not int or type(most) is not int or not 0 <= least <= most <= _MAX_REPEAT:
        return None
    return f"^[\\s\\S]{{{least},{most if 'maxLength' in constraints else ''}}}$"


def _constraints(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keywords of a schema that are no annotations."""
    return {key: value for key, value in schema.items() if not _is_annotation(key, value)}


def _is_annotation(key: str, value: Any) -> bool:
    return key in ANNOTATIONS or (key == "format" and isinstance(value, str) and value not in FORMATS)


def _allows_all(schema: Any) -> bool:
    return schema is True or (isinstance(schema, dict) and not _constraints(schema))


def _but_string(names: Any) -> Any:
    """Return a schema of property names without its type, which is always string."""
    if isinstance(names, dict) and names.get("type") == "string":
        return {key: value for key, value in names.items() if key != "type"}
    return names


def _followed(schema: Any, root: Any) -> Any:
    """Return what a schema that is only a reference into the definitions refers to."""
    if isinstance(schema, dict) and isinstance(reference := schema.get("$ref"), str) and len(schema) == 1:
        node = root
        for part in reference.removeprefix("#/").split("/"):
            node = node.get(part) if isinstance(node, Mapping) else None
        return node
    return schema


def _define(schema: dict[str, Any], root: dict[str, Any]) -> dict[str, Any]:
    """Make `schema` a definition. Returns a reference to it."""
    definitions = root.setdefault("$defs", {})
    name = f"values-{len(definitions)}"
    while name in definitions:
        name += "-"
    definitions[name] = schema
    return {"$ref": f"#/$defs/{name}"}
