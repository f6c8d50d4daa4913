"""Arguments as templates and clients take them."""

from __future__ import annotations

from typing import Any

import pytest

from server.text.tools.tool_messages import for_template, parse_object


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": "x"}', {"a": "x"}),
        (r'{"a": "\ud83d\ude00"}', {"a": "😀"}),
        (r'{"\udc00a": ["\uD800", "\\ud800"]}', {"\ufffda": ["\ufffd", "\\ud800"]}),
        (r'{"a": "\ud800\ud83d\ude00"}', {"a": "\ufffd😀"}),
        (r'["\ud800"]', None),
        ('{"a": ' + "[" * 10**5, None),
        ('{"a": ' + "[" * 10**5 + "]" * 10**5 + "}", None),
        ('{"a": ' + "9" * 5000 + "}", None),
    ],
)
def test_objects(text: str, value: dict[str, Any] | None) -> None:
    parsed = parse_object(text)
    assert parsed == value
    assert str(parsed).encode()


@pytest.mark.parametrize("ids", [{"tool_call_id": "c"}, {}])
def test_results_have_the_name_of_their_call(ids: dict[str, str]) -> None:
    """Of the last call without an id, where there are no ids."""
    call = {"type": "function", "function": {"name": "now", "arguments": "{}"}}
    called = [call | {"id": id} for id in ids.values()] or [call]
    messages: list[dict[str, Any]] = [
        {"role": "assistant", "tool_calls": called},
        {"role": "tool", "content": "1", **ids},
    ]
    assert for_template(messages)[1]["name"] == "now"
