"""Whatever a grammar of calls allows, the format's own parser turns into calls that match the functions."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from models.tokenizer import Tokenizer
from server.errors import ApiError
from server.text.structured import Grammar, StructuredOutputs
from server.text.tool_formats.tool_registry import FORMATS
from server.text.tools.functions import Function, ToolUse
from server.text.tools.tool_format import CallPart, ToolFormat
from server.text.tools.tool_grammar import checked_grammar_of_tools, grammar_of_tools
from tests.support.profiles import examples
from tests.support.tool_walks import Walker, check_calls, functions, parse, write_tool_tokenizer

TOKENS = ["<tool_call>", "</tool_call>", "<think>", "</think>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"]
TOKENS += ["<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>"]
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
GET, FREE = Function("get", CITY, strict=True), Function("free", CITY)
CALL = '<tool_call>\n{"name": "get", "arguments": {"city": "Oslo"}}\n</tool_call>'
WRONG = '<tool_call>\n{"name": "get", "arguments": {"city": 1}}\n</tool_call>'


class Model:
    """Tokenizer of a model, which has the marks of calls as plain text or as tokens."""

    def __init__(self, directory: Path, names: Sequence[str] = (), *, special: bool = False) -> None:
        self.walker = Walker(write_tool_tokenizer(directory, names, special=special))
        tokenizer = Tokenizer(directory)
        self._tokens, self._special_names = tokenizer.names_in_grammars, tokenizer.special_names

    def grammar(self, use: ToolUse, form: ToolFormat, content: Grammar | None = None) -> str:
        grammar = checked_grammar_of_tools(use, form, self._tokens, self._special_names, content)
        assert grammar is not None
        return grammar.text

    def matches(self, use: ToolUse, form: str, *answers: str, content: Grammar | None = None) -> list[bool]:
        grammar = self.grammar(use, FORMATS[form], content)
        return [self.walker.matches(grammar, answer) for answer in answers]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Model]:
    text, tokens, special = (tmp_path_factory.mktemp(kind) for kind in ("text", "tokens", "special"))
    return [Model(text), Model(tokens, TOKENS), Model(special, TOKENS, special=True)]


@pytest.fixture(params=list(FORMATS))
def form(request: pytest.FixtureRequest) -> ToolFormat:
    return FORMATS[request.param]


WALKS = examples(7, 40, suppress_health_check=[HealthCheck.function_scoped_fixture])
"""In each format."""


@WALKS
@given(offered=functions(), seed=st.integers(0, 2**32), parallel=st.booleans(), named=st.booleans())
def test_answers_that_have_to_call(
    offered: list[Function], seed: int, parallel: bool, named: bool, models: list[Model], form: ToolFormat
) -> None:
    chance = random.Random(seed)
    use = ToolUse(offered, offered[:1] if named else offered, "required", parallel)
    model = chance.choice(models)
    answer = model.walker.walk(model.grammar(use, form), chance)
    parts = parse(form.parser(use.callable), [answer])
    calls = check_calls(parts, use.callable)
    assert len(calls) == len(parts), answer  # there is no text
    assert len(calls) >= 1 if parallel else len(calls) == 1, answer


@WALKS
@given(offered=functions(strict=True), seed=st.integers(0, 2**32), parallel=st.booleans(), talks=st.booleans())
def test_calls_whose_arguments_are_bound(
    offered: list[Function], seed: int, parallel: bool, talks: bool, models: list[Model], form: ToolFormat
) -> None:
    chance = random.Random(seed)
    model, text = chance.choice(models), "hm, <tool " if talks else ""
    grammar = model.grammar(ToolUse(offered, offered, "auto", parallel), form)
    begins = {"llama_json": "{", "harmony": "<|channel|>"}  # and have no trigger
    answer = model.walker.walk(grammar, chance, begins.get(form.name, text + form.trigger))
    parts = parse(form.parser(offered), [answer])
    calls = check_calls(parts, offered)
    assert calls, answer
    assert parallel or len(calls) == 1
    assert not form.trigger or not text or parts[0] == text


def test_text_and_calls(models: list[Model]) -> None:
    answers = [
        "",
        "hm",
        f"hm {CALL}",
        f"{CALL}\n{CALL}",
        f"a {CALL} b {CALL} c",
        WRONG,
        f"hm {WRONG}",
        f"{CALL} {WRONG}",
    ]
    for model in models:
        use = ToolUse([GET], [GET], "auto")
        assert model.matches(use, "hermes", *answers) == [True] * 5 + [False] * 3
        assert model.matches(replace(use, parallel=False), "hermes", *answers) == [True] * 3 + [False] * 5
        assert model.matches(replace(use, mode="required"), "hermes", *answers) == [False] * 3 + [True] + [False] * 4


def test_a_mark_that_is_spelled_out_where_the_model_has_a_token(models: list[Model]) -> None:
    grammar = models[1].grammar(ToolUse([GET], [GET], "auto"), FORMATS["hermes"])
    assert models[1].walker.matches(grammar, "<tool_call")
    assert not models[1].walker.matches(grammar, "<tool_call>", spelled=True)


def test_thoughts_are_text(models: list[Model]) -> None:
    for form in ("hermes", "llama_json", "generic_json"):
        assert models[1].matches(ToolUse([GET], [GET], "auto"), form, "<think>hm</think>\n\nHello") == [True]


def test_functions_that_are_not_strict_take_any_object(models: list[Model]) -> None:
    answers = [call.replace('"get"', '"free"') for call in (CALL, WRONG)]
    for model in models:
        assert model.matches(ToolUse([GET, FREE], [GET, FREE], "auto"), "hermes", *answers) == [True, True]
        assert model.matches(ToolUse([FREE], [FREE], "required"), "hermes", *answers) == [True, False]


def test_functions_that_may_not_be_called(models: list[Model]) -> None:
    for model in models:
        assert model.matches(ToolUse([GET, FREE], [FREE], "auto"), "hermes", CALL, "hm") == [False, True]
        assert model.matches(ToolUse([GET], [], "auto"), "hermes", CALL, "hm") == [False, True]
        assert model.matches(ToolUse([GET], [], "auto"), "llama_json", '{"a": 1}', "hm") == [True, True]


def test_answers_of_llama_that_are_calls_or_text(models: list[Model]) -> None:
    call = '{"name": "get", "parameters": {"city": "Oslo"}}'
    answers = [
        call,
        "",
        " \n",
        "Hello {}",
        "\nHello",
        f"{call}; {call}",
        '{"a": 1}',
        f" {call}",
        f"hm <|python_tag|>{call}",
    ]
    for model in models:
        use = ToolUse([GET], [GET], "auto")
        assert model.matches(use, "llama_json", *answers) == [True] * 6 + [False] * 3
        assert model.matches(replace(use, parallel=False), "llama_json", *answers) == [True] * 5 + [False] * 4


def test_both_forms_of_mistral(models: list[Model]) -> None:
    arguments = '{"city": "Oslo"}'
    call = f'{{"name": "get", "arguments": {arguments}}}'
    once = [f"[TOOL_CALLS] [{call}]", f"[TOOL_CALLS][{call}]", f"[TOOL_CALLS]get[ARGS]{arguments}"]
    twice = [f"[TOOL_CALLS][{call}, {call}]", once[2] * 2]
    for model in models:
        use = ToolUse([GET], [GET], "required")
        assert all(model.matches(use, "mistral", *once, *twice))
        assert model.matches(replace(use, parallel=False), "mistral", *once, *twice) == [True] * 3 + [False] * 2


@pytest.mark.parametrize(
    "parameters",
    [{}, {"type": "object", "properties": {}}, {"properties": {}, "required": [], "title": "Nothing"}],
)
@pytest.mark.parametrize("name", ["hermes", "qwen_xml"])
def test_functions_without_parameters(name: str, parameters: dict[str, Any], models: list[Model]) -> None:
    function = Function("now", parameters)
    grammar = models[0].grammar(ToolUse([function], [function], "required", parallel=False), FORMATS[name])
    answer = models[0].walker.walk(grammar, random.Random(0))
    assert parse(FORMATS[name].parser([function]), [answer]) == [CallPart(0, "now", "{}")]


@pytest.mark.parametrize("name", ["hermes", "qwen_xml"])
def test_schemas_that_refer_to_their_definitions(name: str, models: list[Model]) -> None:
    colour, shape = {"enum": ["red"]}, {"type": "object", "properties": {"c": {"$ref": "#/$defs/C"}}, "required": ["c"]}
    schemas = [
        {
            "type": "object",
            "properties": {"a": {"$ref": "#/$defs/C"}, "b": {"$ref": "#/$defs/S"}},
            "required": ["a", "b"],
            "additionalProperties": False,
            "$defs": {"C": definition, "S": {**shape, "additionalProperties": False}},
        }
        for definition in (colour, {"const": 7})
    ]
    offered = [Function(f"f{i}", schema) for i, schema in enumerate(schemas)]
    grammar = models[0].grammar(ToolUse(offered, offered, "required"), FORMATS[name])
    for seed in range(8):
        answer = models[0].walker.walk(grammar, random.Random(seed))
        for called, arguments in check_calls(parse(FORMATS[name].parser(offered), [answer]), offered):
            value = "red" if called == "f0" else 7
            assert arguments == {"a": value, "b": {"c": value}}


def test_masks_in_text_and_calls_roll_back(models: list[Model]) -> None:
    for model in models:
        for form in FORMATS.values():
            for mode in ("auto", "required"):
                assert model.walker.rolls_back(model.grammar(ToolUse([GET], [GET], mode), form)), (form.name, mode)


@pytest.mark.parametrize(
    "asked",
    [
        {"json": {"properties": {"a": {"$ref": "#/$defs/A"}}, "required": ["a"], "$defs": {"A": {"const": 1}}}},
        {"regex": '\\{"a": 1\\}'},
        {"choice": ['{"a": 1}', "x"]},
    ],
)
def test_calls_or_content_that_is_bound(asked: dict[str, Any], models: list[Model]) -> None:
    content = StructuredOutputs.model_validate(asked).compiled()
    call = '{"name": "get", "parameters": {"city": "Oslo"}}'
    for model in models:
        use = ToolUse([GET], [GET], "auto")
        matching = [True, True, False, False, False]
        answers = [CALL, '{"a": 1}', "hm", f"hm {CALL}", WRONG]
        assert model.matches(use, "hermes", *answers, content=content) == matching
        answers = [call, '{"a": 1}', "hm", f"hm {call}", '{"name": "get", "parameters": {"city": 1}}']
        assert model.matches(use, "llama_json", *answers, content=content) == matching
        required = ToolUse([GET], [GET], "required")
        assert model.matches(required, "hermes", CALL, '{"a": 1}', content=content) == [True, False]
        assert model.matches(ToolUse([GET], [], "auto"), "hermes", CALL, '{"a": 1}', content=content) == [False, True]


def test_answers_that_nothing_holds() -> None:
    content = StructuredOutputs.model_validate({"choice": ["a"]}).compiled()
    for use in (ToolUse(), ToolUse([FREE], [FREE], "auto"), ToolUse([GET], [GET], "none")):
        assert grammar_of_tools(use, FORMATS["hermes"], {}, ()) is None
    assert grammar_of_tools(ToolUse([GET], [GET], "none"), FORMATS["hermes"], {}, (), content) is content


def test_functions_that_are_not_strict_beside_content(models: list[Model]) -> None:
    content = StructuredOutputs.model_validate({"choice": ["a"]}).compiled()
    answers = ["a", "b", WRONG.replace('"get"', '"free"'), CALL]
    for model in models:
        use = ToolUse([FREE], [FREE], "auto")
        assert model.matches(use, "hermes", *answers, content=content) == [True, False, True, False]


def refusal(function: Function, form: str = "hermes", tokens: dict[str, int] | None = None) -> str:
    with pytest.raises(ApiError) as caught:
        checked_grammar_of_tools(ToolUse([function], [function], "required"), FORMATS[form], tokens or {}, ())
    return str(caught.value)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    "schema",
    [{"const": "a<|x|>"}, {"enum": ["<|x|>"]}, {"type": "string", "pattern": r"<\|x\|>"}, {"required": ["<|x|>"]}],
)
def test_values_that_are_tokens(form: str, schema: dict[str, Any]) -> None:
    message = "a value, pattern or property name of the JSON schema contains the name of a special token, <|x|>"
    function = Function("f", {"type": "object", "properties": {"a": schema}})
    assert refusal(function, form, tokens={"<|x|>": 3}) == f"tools: function f: {message}"


def test_names_that_are_tokens() -> None:
    message = "tools: the name of a function contains the name of a special token, end"
    assert refusal(Function("send", {}), tokens={"end": 3}) == message


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"type": "string"}, "expected a JSON schema of an object as its parameters"),
        ({"enum": [1]}, "expected a JSON schema of an object as its parameters"),
        (
            {"properties": {"a": {"const": "<|x|>"}}},
            "a value, pattern or property name of the JSON schema contains the name of a special token, <|x|>",
        ),
    ],
)
def test_parameters_that_are_refused(parameters: dict[str, Any], reason: str) -> None:
    assert refusal(Function("f", parameters), tokens={"<|x|>": 3}) == f"tools: function f: {reason}"


@pytest.mark.parametrize(
    ("schema", "matching", "other"),
    [
        (
            {
                "properties": {"kind": {"type": "string"}},
                "required": ["kind"],
                "anyOf": [
                    {"properties": {"x": {"type": "integer"}}, "required": ["x"]},
                    {"properties": {"y": {"type": "integer"}}, "required": ["y"]},
                ],
            },
            '{"kind": "a", "x": 1}',
            '{"kind": "a", "x": "1"}',
        ),
        (
            {
                "$ref": "#/$defs/B",
                "properties": {"y": {"type": "integer"}},
                "required": ["y"],
                "$defs": {"B": {"type": "object", "properties": {"x": {"type": "integer"}}}},
            },
            '{"x": 1, "y": 2}',
            '{"x": 1}',
        ),
    ],
)
def test_objects_that_are_described_in_parts(
    schema: dict[str, Any], matching: str, other: str, models: list[Model]
) -> None:
    function = Function("f", {"type": "object", **schema})
    answers = [f'<tool_call>\n{{"name": "f", "arguments": {each}}}\n</tool_call>' for each in (matching, other)]
    assert models[0].matches(ToolUse([function], [function], "required"), "hermes", *answers) == [True, False]


def test_keywords_that_are_not_served() -> None:
    schema = {"properties": {"a": {"type": "array", "uniqueItems": True}}}
    message = "tools: not served in a JSON schema: uniqueItems (at f: #/properties/a)"
    assert refusal(Function("f", schema)) == message


def test_no_function_where_one_has_to_be_called() -> None:
    with pytest.raises(ApiError, match="tools: no function, but one has to be called"):
        grammar_of_tools(ToolUse([GET], [], "required"), FORMATS["hermes"], {}, ())


def test_many_functions_are_bounded_in_length() -> None:
    schema = {"properties": {"a": {"enum": ["x" * 5000], "description": "d" * 10_000}}}
    offered = [Function(f"f{i}", schema) for i in range(60)]
    grammar_of_tools(ToolUse(offered[:40], offered[:40], "required"), FORMATS["hermes"], {}, ())
    with pytest.raises(ApiError, match="tools: the schemas have more than 262144 characters"):
        grammar_of_tools(ToolUse(offered, offered, "required"), FORMATS["hermes"], {}, ())
