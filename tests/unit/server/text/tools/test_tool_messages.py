"""Arguments as templates and clients take them."""

from __future__ import annotations

from typing import Any

import pytest

from server.text.tools.tool_messages import parse_object


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
