"""Messages and tools as chat templates take them: arguments are objects, messages have a text, and results a name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from server.text.tools.functions import Function


def for_template(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return messages whose calls have arguments as objects, whose content is a text, and whose results of calls have
    the function's name. Arguments that are no JSON object stay as they are: a model may have written them."""
    prepared = [_message(message) for message in messages]
    names: dict[Any, str] = {}
    for message in prepared:
        names |= {call.get("id"): call["function"]["name"] for call in message.get("tool_calls", ())}
        called = names.get(message.get("tool_call_id"))
        if message["role"] == "tool" and not message.get("name") and called is not None:
            message["name"] = called
    return prepared


def one_call_each(messages: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Split messages of several calls, which some templates refuse, into one for each call, its result after it."""
    groups: list[list[dict[str, Any]]] = []
    group_of: dict[Any, list[dict[str, Any]]] = {}
    """Message of each call that was split off, by the id of the call."""
    for message in messages:
        calls = message.get("tool_calls", ())
        if message.get("role") == "tool" and (group := group_of.pop(message.get("tool_call_id"), None)) is not None:
            group.append(message)
            continue
        if len(calls) < 2:
            groups.append([message])
            continue
        group_of = {}
        for call in calls:
            groups.append([{**message, "tool_calls": [call]}])
            message = {**message, "content": ""}  # its texts stand before the first call
            message.pop("reasoning_content", None)
            group_of[call.get("id")] = groups[-1]
    return [message for group in groups for message in group]


def as_tools(functions: Sequence[Function]) -> list[dict[str, Any]] | None:
    """Return functions as templates take them; None if there are none."""
    return [function.as_tool() for function in functions] or None


def parse_object(text: str) -> dict[str, Any] | None:
    """Parse JSON; None if it is no object. Halves of characters, which JSON can escape but UTF-8 cannot encode, become
    U+FFFD."""
    try:
        value = json.loads(text)
        if "\\ud" in text.lower():
            whole = json.dumps(value, ensure_ascii=False)
            value = json.loads(whole.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    changed = dict(message)
    if changed.get("content") is None:
        changed["content"] = ""
    calls = changed.pop("tool_calls", None)
    if calls:
        changed["tool_calls"] = [_call(call) for call in calls]
    return changed


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call["function"])
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        parsed = parse_object(arguments or "{}")
        function["arguments"] = arguments if parsed is None else parsed
    return {**call, "function": function}
