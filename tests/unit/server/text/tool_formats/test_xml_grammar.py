"""Parameters that are tags: what their grammar matches, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from server.errors import ApiError
from server.text.tool_formats.tool_registry import FORMATS
from server.text.tools.functions import Function, ToolUse
from server.text.tools.tool_grammar import checked_grammar_of_tools
from tests.support.tool_walks import Walker, check_calls, parse, write_tool_tokenizer

FORM = FORMATS["qwen_xml"]
TEXT = {"S": {"type": "string"}}


@pytest.fixture(scope="module")
def walker(tmp_path_factory: pytest.TempPathFactory) -> Walker:
    return Walker(write_tool_tokenizer(tmp_path_factory.mktemp("text"), [], special=False))


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"anyOf": [{"required": ["a"]}]}, "anyOf"),
        ({"properties": {"a": {"type": "string", "not": {"const": "x"}}}}, "not"),
        ({"properties": {"a>": {}}}, 'the name of the parameter "a>"'),
        ({"properties": {"a": {}}, "required": None}, "required that is no list"),
        ({"properties": {"a": {"type": "string", "enum": 5}}}, "enum that is no list"),
        ({"properties": None}, "properties that are no object"),
        (
            {"properties": {"a": {"type": "string", "pattern": "^a|b$"}}},
            'the pattern "^a|b$"; put its alternatives in parentheses',
        ),
        ({"properties": {"a": {"type": "string", "minLength": "0}/ /x"}}}, "a length that is not an integer"),
        (
            {"properties": {"a": {"const": "a</parameter>"}}},
            "an enum or const with </parameter> in it, or with a pattern or length beside it",
        ),
        ({"properties": {"a": {"$ref": "#/$defs/S", "maxLength": 2}}, "$defs": TEXT}, "maxLength beside $ref"),
        (
            {"properties": {"a": {"$ref": "#/$defs/T"}}, "$defs": {**TEXT, "T": {"$ref": "#/$defs/S", "enum": ["b"]}}},
            "enum beside $ref",
        ),
        ({"$ref": "#/$defs/O", "required": ["a"], "$defs": {"O": {"type": "object"}}}, "required beside $ref"),
        ({"$ref": "#/$defs/O"}, "a $ref that leads to no schema"),
        (
            {"properties": {"a": {"type": "integer"}, "b": {"type": "array", "items": {"$ref": "#/properties/a"}}}},
            'the $ref "#/properties/a", which is not into the definitions',
        ),
        (
            {
                "properties": {"a": {"anyOf": [{"$ref": "#/$defs/A"}, {"type": "null"}]}},
                "$defs": {"A": {"properties": {"x": {"$ref": "#"}}}},
            },
            'the $ref "#", which is not into the definitions',
        ),
    ],
)
def test_parameters_that_tags_do_not_serve(parameters: dict[str, Any], reason: str) -> None:
    function = Function("f", parameters)
    with pytest.raises(ApiError) as caught:
        checked_grammar_of_tools(ToolUse([function], [function], "required"), FORM, {}, ())
    assert str(caught.value) == f"tools: function f: not served in the tool format of this model: {reason}"


@pytest.mark.parametrize(
    ("schema", "matching", "others"),
    [
        ({"type": "string"}, ["", "a\n\nb\n", "<b> </para", '"'], ["</parameter>"]),
        ({"type": "string", "minLength": 2, "maxLength": 3}, ["ab", "a\nb", "grö"], ["a", "abcd"]),
        ({"type": "string", "pattern": "^a/[0-9]+$"}, ["a/1", "a/123"], ["a/", "xa/1", "a/1x"]),
        ({"type": "string", "pattern": "b|c"}, ["b", "abd", "c\n"], ["a"]),
        ({"type": "string", "pattern": "\\$$"}, ["$", "a$"], ["$a"]),
        ({"enum": ["red", "a\nb"]}, ["red", "a\nb"], ["re", "reda", '"red"']),
        ({"type": "integer"}, ["1", "-20"], ["a", '"1"', "1.5"]),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, ['"a"', "null"], ["a", "1"]),
        ({"type": "array", "items": {"type": "string"}}, ["[]", '["a</parameter>"]'], ["a"]),
        ({"$ref": "#/$defs/S", "type": "string", "title": "x"}, ["a", "1"], []),
        ({"$ref": "#/$defs/I", "maximum": 5}, ["1", "5"], ["6", "a"]),
        ({"type": "array", "items": {"$ref": "#/$defs/I"}, "$defs": {"I": {"type": "null"}}}, ["[1]"], ["[null]"]),
    ],
)
def test_values_in_tags(schema: dict[str, Any], matching: list[str], others: list[str], walker: Walker) -> None:
    definitions = {**TEXT, "I": {"type": "integer"}}
    function = Function("f", {"properties": {"p": schema}, "required": ["p"], "$defs": definitions})
    form = "<tool_call>\n<function=f>\n<parameter=p>\n{}\n</parameter>\n</function>\n</tool_call>"
    answers = [form.format(value) for value in [*matching, *others]]
    expected = [True] * len(matching) + [False] * len(others)
    grammar = checked_grammar_of_tools(ToolUse([function], [function], "required"), FORM, {}, ())
    assert grammar is not None
    assert [walker.matches(grammar.text, answer) for answer in answers] == expected
    for answer in answers[: len(matching)]:
        check_calls(parse(FORM.parser([function]), [answer]), [function])
