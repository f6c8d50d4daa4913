"""Parsers of all formats on text made of pieces of calls."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.text.tool_formats.tool_registry import FORMATS
from server.text.tools.functions import Function
from server.text.tools.tool_format import CallPart
from tests.support.profiles import examples
from tests.support.tool_walks import OFFERED, parse

PIECES = [
    *("<tool_call>", "</tool_call>", "<function=now>", "<function=get_weather>", "</function>", "</parameter>"),
    *(
        "<parameter=city>",
        "<parameter=days>",
        "[TOOL_CALLS]",
        "[ARGS]",
        "[CALL_ID]",
        "<|python_tag|>",
        "now",
        "get_weather",
    ),
    *("<|channel|>", "<|message|>", "<|call|>", "commentary to=functions.now ", " to=functions.get_weather"),
    *("{", "}", "[", "]", ",", ":", ";", '"', "\\", "\\u00e5", "\\ud83d", "\n", " ", "<", "å", "🙂", "null", "7"),
    *('"name"', '"arguments"', '"parameters"', '"now"', '"{', '{"name": "now", "arguments": {', '{"a": "b"}', "text"),
]
CALLS = [Function(name, parameters) for name, parameters in OFFERED.items()]


@pytest.mark.parametrize("name", FORMATS)
@examples(70, 300)
@given(pieces=st.lists(st.sampled_from(PIECES), max_size=30), cuts=st.lists(st.integers(0, 400)))
def test_any_text_in_any_pieces(name: str, pieces: list[str], cuts: list[int]) -> None:
    text = "".join(pieces)
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    whole = parse(FORMATS[name].parser(CALLS), [text])
    assert parse(FORMATS[name].parser(CALLS), [text[first:last] for first, last in pairwise(places)]) == whole
    assert parse(FORMATS[name].parser(CALLS), list(text)) == whole
    calls = [part for part in whole if isinstance(part, CallPart)]
    assert [call.index for call in calls] == list(range(len(calls)))
    assert all(call.name in OFFERED for call in calls)
    if not calls:
        assert "".join(part for part in whole if isinstance(part, str)) == text
    assert parse(FORMATS[name].parser([]), [text]) == ([text] if text else [])
