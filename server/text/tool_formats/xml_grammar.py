"""Grammar of parameters that are tags: strings are plain text, all other values are JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from server.errors import ApiError
from server.text.json_schema import ANNOTATIONS
from server.text.tools.functions import Function
from server.text.tools.parameter_values import is_text, referred
from server.text.tools.tool_format import GrammarWriter

_END = "\n</parameter>"
_NOT_END = r"~/(?s:.*)<\/parameter>(?s:.*)/"
_ANY_TEXT = "/(?s:.*)/"
_OF_OBJECT = frozenset(
    ("$defs", "$schema", "additionalProperties", "definitions", "properties", "required", "strict", "type")
)
_OF_TEXT = frozenset(("const", "enum", "format", "maxLength", "minLength", "pattern", "type"))
"""Keywords that are served. A format of plain text is an annotation."""
_BESIDE_REFERENCE = frozenset(("$defs", "$ref", "$schema", "definitions", "type"))
"""Keywords that a reference may have beside it: they say no more of the values, whose types are known by then."""
_MAX_REFERENCES = 16
"""Number of references, each to the next, that are followed."""


def write_parameters(function: Function, write: GrammarWriter) -> str:
    """Write the expression of all parameters of a call, in the order of the schema. Raises ApiError."""
    write.check(function)  # what is written as text is not checked otherwise
    root = function.parameters
    schema = _followed(function, root)
    _refuse_others(function, schema, _OF_OBJECT)
    properties, others = schema.get("properties"), schema.get("additionalProperties", True)
    required = [name for name in _list(function, schema, "required") or () if isinstance(name, str)]
    if "properties" not in schema:
        properties = {}
    elif not isinstance(properties, Mapping):
        raise _not_served(function, "properties that are no object")
    known = {**properties, **{name: others for name in required if name not in properties}}
    if not known and "properties" not in schema and root and others is not False:
        name = write.terminal(r"/\n<parameter=[^<>\n]{1,64}>\n/")
        value = _value(function, others, write) if isinstance(others, Mapping) else _text(_ANY_TEXT, write)
        return f"({name} {value})*"
    written = []
    for name, each in known.items():
        if re.search(r"[<>\n]", name):
            raise _not_served(function, f"the name of the parameter {json.dumps(name)}")
        begin = write.text(f"\n<parameter={name}>\n")
        rule = write.rule(f"{begin} {_value(function, each, write)}")
        written.append(rule if name in required else f"{rule}?")
    return " ".join(written)


def _value(function: Function, schema: Any, write: GrammarWriter) -> str:
    """Write the expression of a value and its end."""
    root = function.parameters
    if not is_text(schema, root):
        _refuse_references(function, schema)
        return f"{write.value(function, schema)} {write.text(_END)}"
    plain = _followed(function, schema)
    _refuse_others(function, plain, _OF_TEXT)
    listed = _listed(function, plain)
    if listed is None:
        return _text(" & ".join([_ANY_TEXT, *_constraints(function, plain)]), write)
    if any(_END.strip() in text for text in listed) or plain.keys() & {"pattern", "minLength", "maxLength"}:
        raise _not_served(function, "an enum or const with </parameter> in it, or with a pattern or length beside it")
    return "(" + " | ".join(write.text(text + _END) for text in listed) + ")"


def _followed(function: Function, schema: Any) -> Mapping[str, Any]:
    """Return what a schema refers to, or itself. Raises ApiError."""
    for _ in range(_MAX_REFERENCES):
        if not isinstance(schema, Mapping):
            break
        if not isinstance(schema.get("$ref"), str):
            return schema
        if others := sorted(schema.keys() - _BESIDE_REFERENCE - ANNOTATIONS):
            raise _not_served(function, f"{', '.join(others)} beside $ref")
        schema = referred(schema, function.parameters)
    raise _not_served(function, "a $ref that leads to no schema")


def _refuse_references(function: Function, schema: Any) -> None:
    """Raise ApiError if a value's schema has references that are not into the definitions. They alone go with it."""
    root = function.parameters
    work = [schema]
    if "$ref" in json.dumps(schema):
        work += [root.get("$defs"), root.get("definitions")]
    while work:
        node = work.pop()
        if isinstance(node, Mapping):
            reference = node.get("$ref")
            if isinstance(reference, str) and not reference.startswith(("#/$defs/", "#/definitions/")):
                raise _not_served(function, f"the $ref {json.dumps(reference)}, which is not into the definitions")
            work += node.values()
        elif isinstance(node, list):
            work += node


def _text(expression: str, write: GrammarWriter) -> str:
    """Write the expression of a text that matches `expression`, and of its end."""
    body = write.terminal(f"{expression} & {_NOT_END}")
    return write.terminal(f"{body} {json.dumps(_END)}")


def _list(function: Function, schema: Mapping[str, Any], name: str) -> list[Any] | None:
    """Return the value of a keyword, a list; None: it is not there. Raises ApiError."""
    values = schema.get(name)
    if name in schema and not isinstance(values, list):
        raise _not_served(function, f"{name} that is no list")
    return values


def _listed(function: Function, schema: Mapping[str, Any]) -> list[str] | None:
    """Return the strings that a schema lists, if it does. Raises ApiError."""
    values = _list(function, schema, "enum")
    if values is None and "const" not in schema:
        return None
    values = [schema["const"]] if values is None else values
    return [text for text in values if isinstance(text, str) and schema.get("const", text) == text]


def _constraints(function: Function, schema: Mapping[str, Any]) -> list[str]:
    found = []
    least, most = schema.get("minLength", 0), schema.get("maxLength")
    if least or most is not None:
        if type(least) is not int or type(most) not in (int, type(None)):
            raise _not_served(function, "a length that is not an integer")
        found.append(f"/(?s:.{{{least},{'' if most is None else most}}})/")
    if "pattern" in schema:
        pattern = str(schema["pattern"])
        first, last = pattern.startswith("^"), bool(re.search(r"(?<!\\)(?:\\\\)*\$$", pattern))
        if (first or last) and _has_alternatives(pattern):
            raise _not_served(function, f"the pattern {json.dumps(pattern)}; put its alternatives in parentheses")
        inner = pattern[first : len(pattern) - last]
        escaped = re.sub(r"\\.|[/\n]", lambda found: {"/": r"\/", "\n": r"\n"}.get(found[0], found[0]), inner)
        found.append(f"/{'' if first else '(?s:.*)'}({escaped}){'' if last else '(?s:.*)'}/")
    return found


def _has_alternatives(pattern: str) -> bool:
    """Whether a regex has alternatives outside parentheses."""
    depth = 0
    for sign in re.findall(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|[()|]", pattern):
        depth += (sign == "(") - (sign == ")")
        if sign == "|" and not depth:
            return True
    return False


def _refuse_others(function: Function, schema: Mapping[str, Any], served: frozenset[str]) -> None:
    others = sorted(schema.keys() - served - ANNOTATIONS)
    if others:
        raise _not_served(function, ", ".join(others))


def _not_served(function: Function, what: str) -> ApiError:
    reason = f"not served in the tool format of this model: {what}"
    return ApiError(f"tools: function {function.name}: {reason}", param="tools")
