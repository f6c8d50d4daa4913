"""JSON schemas that pydantic and other clients write are served, or refused by the name of what is not."""

from __future__ import annotations

import copy
import enum
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import jsonschema
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer

from models.tokenizer import Tokenizer
from server.errors import ApiError
from server.text import structured
from server.text.json_schema import FORMATS, close_objects, exceeds
from server.text.structured import StructuredOutputs, check_grammar
from tests.support.profiles import examples


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer(directory)


@pytest.fixture(scope="module")
def compiler(directory: Path) -> LLTokenizer:
    return LLTokenizer(str(directory / "tokenizer.json"), n_vocab=320, eos_token=[2])


def compiled(schema: Any) -> str:
    grammar = StructuredOutputs.model_validate({"json": schema}).compiled()
    check_grammar(grammar)
    return grammar.text


def refusal(**asked: Any) -> str:
    with pytest.raises(ApiError) as caught:
        check_grammar(StructuredOutputs.model_validate(asked).compiled())
    message = caught.value.body()["error"]["message"]
    assert message is not None
    assert len(message) <= 500
    assert message.isprintable()
    return message


class Accepts:
    """Whether values match the grammar of a schema."""

    def __init__(self, schema: Any, tokenizer: Tokenizer, compiler: LLTokenizer) -> None:
        self._matcher = LLMatcher(compiler, compiled(schema))
        self._tokenizer = tokenizer

    def __call__(self, value: Any) -> bool:
        text = json.dumps(value)
        self._matcher.reset()
        tokens = self._tokenizer.encode(text, add_special_tokens=False)
        return self._matcher.validate_tokens([*tokens, 2]) == len(tokens) + 1


class Cat(pydantic.BaseModel):
    kind: Literal["cat"] = "cat"
    lives: int


class Dog(pydantic.BaseModel):
    kind: Literal["dog"] = "dog"
    lives: int


class Size(enum.Enum):
    SMALL = "small"
    LARGE = "large"


class Everything(pydantic.BaseModel):
    password: pydantic.SecretStr
    raw: bytes
    path: Path
    pet: Cat | Dog = pydantic.Field(discriminator="kind")
    sizes: dict[Size, int]
    letters: dict[Literal["a", "b"], list[int]]
    names: dict[Annotated[str, pydantic.Field(pattern="^x")], int]
    pair: tuple[int, str] = pydantic.Field(deprecated=True, examples=[[1, "a"]], title="Pair")


EXAMPLE = {
    "password": "p",
    "raw": "r",
    "path": "/tmp",
    "pet": {"kind": "dog", "lives": 1},
    "sizes": {"small": 1, "large": 2},
    "letters": {"b": [1]},
    "names": {"xy": 1},
    "pair": [1, "a"],
}


def test_what_pydantic_writes(tokenizer: Tokenizer, compiler: LLTokenizer) -> None:
    schema = Everything.model_json_schema()
    accepts = Accepts(schema, tokenizer, compiler)
    jsonschema.validate(EXAMPLE, schema)
    assert accepts(EXAMPLE)
    for name, wrong in (
        ("pet", {"lives": 1}),
        ("pet", {"kind": "cow", "lives": 1}),
        ("sizes", {"medium": 1}),
        ("sizes", {"small": "1"}),
        ("letters", {"a": ["1"]}),
        ("names", {"xy": "1"}),
        ("pair", [1]),
    ):
        value = EXAMPLE | {name: wrong}
        assert not jsonschema.Draft202012Validator(schema).is_valid(value)
        assert not accepts(value)


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_formats_that_are_enforced(name: str, tokenizer: Tokenizer, compiler: LLTokenizer) -> None:
    schema = {"type": "string", "format": name}
    assert json.loads(compiled(schema))["grammars"][0]["json_schema"]["format"] == name
    assert Accepts(schema, tokenizer, compiler)("") == (name == "unknown")


@pytest.mark.parametrize("name", ["password", "binary", "byte", "int32", "regex", "uuid4", "anything at all"])
def test_other_formats_are_annotations(name: str, tokenizer: Tokenizer, compiler: LLTokenizer) -> None:
    assert LLMatcher.validate_grammar(
        LLMatcher.grammar_from_json_schema(json.dumps({"type": "string", "format": name})), None
    )
    assert Accepts({"type": "string", "format": name}, tokenizer, compiler)("whatever")


OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}, "format": {"type": "string"}}}
NOTHING: list[Any] = [True, {}, {"title": "x", "description": "y"}]


@pytest.mark.parametrize(
    "constraint",
    [
        {"uniqueItems": False},
        {"minProperties": 0},
        *({"propertyNames": names} for names in (*NOTHING, {"type": "string"}, {"format": "path"})),
        {"propertyNames": {"$ref": "#/$defs/name"}, "$defs": {"name": {"type": "string", "format": "path"}}},
        *({"unevaluatedProperties": rest, "unevaluatedItems": rest} for rest in NOTHING),
        {"minContains": 2, "maxContains": 3},
        {"contains": {"type": "string"}, "minContains": 0},
        {"if": {"required": ["a"]}},
        {"then": {"required": ["a"]}, "else": False},
        {"if": {"required": ["a"]}, "then": True, "else": {}},
        {"not": False},
        {"dependentRequired": {}, "dependentSchemas": {"a": {}}},
        {"dependentRequired": {"a": []}, "dependencies": {"a": [], "b": True}},
        {"contentEncoding": "base64", "contentMediaType": "a/b", "discriminator": {"propertyName": "a"}},
        {"deprecated": True, "readOnly": True, "writeOnly": True, "$comment": "x", "examples": [1], "default": {}},
        {"x-order": 1, "nullable": True},
    ],
)
def test_what_constrains_nothing_is_served(
    constraint: dict[str, Any], tokenizer: Tokenizer, compiler: LLTokenizer
) -> None:
    accepts = Accepts({**OBJECT, **constraint}, tokenizer, compiler)
    for value in ({"a": 1, "format": "password", "b": None}, {}):
        assert accepts(value)
    assert not accepts({"a": "1"})


@pytest.mark.parametrize(
    ("constraint", "named"),
    [
        ({"uniqueItems": True}, "uniqueItems"),
        ({"contains": {}, "maxContains": 2}, "contains"),
        ({"contains": {}}, "contains"),
        ({"propertyNames": {"minLength": 2, "pattern": "a"}}, "propertyNames"),
        ({"propertyNames": {"minLength": 2, "maxLength": 1}}, "propertyNames"),
        ({"propertyNames": {"minLength": "2"}}, "propertyNames"),
        ({"propertyNames": {"maxLength": 2**31}}, "propertyNames"),
        ({"propertyNames": {"minLength": 2}, "properties": {"a": {}}}, "propertyNames"),
        ({"propertyNames": {"format": "date"}}, "propertyNames"),
        ({"propertyNames": False}, "propertyNames"),
        ({"dependentRequired": {"a": ["b"]}}, "dependentRequired"),
        ({"dependentSchemas": {"a": False}}, "dependentSchemas"),
        ({"if": {}, "then": False}, "if"),
        ({"not": {}}, "not"),
        ({"unevaluatedProperties": False}, "unevaluatedProperties"),
        ({"minProperties": 1, "properties": {"a": {}}}, "minProperties"),
        ({"oneOf": [{"minimum": 1}, {"maximum": 5}]}, "oneOf"),
    ],
)
def test_other_constraints_are_refused_by_name_and_place(constraint: dict[str, Any], named: str) -> None:
    schema = {"type": "object", "properties": {"tags": {"type": ["array", "object"], **constraint}}}
    assert named in (message := refusal(json=schema))
    assert "#/properties/tags" in message
    assert refusal(json=json.dumps(schema)) == message


@pytest.mark.parametrize(
    "schema",
    [
        {"enum": [1, 1234567890123456789]},
        {"const": {"a": [2**53 + 1]}},
        *({"type": "integer", key: -(2**53) - 1} for key in ("minimum", "exclusiveMaximum", "exclusiveMinimum")),
        {"type": "integer", "maximum": 2**53 + 1},
        {"type": "integer", "multipleOf": 2**53 + 1},
        {"const": 10**400},
        {"$ref": "#/x/y", "x": {"y": {"const": 2**53 + 1}}},
    ],
)
def test_integers_that_the_compiler_would_round_are_refused(schema: Any) -> None:
    message = refusal(json=schema)
    assert message.startswith("structured_outputs: not served in a JSON schema: the integer ")
    assert message.endswith(", which a float64 does not hold")


def test_other_large_integers(tokenizer: Tokenizer, compiler: LLTokenizer) -> None:
    for number in (2**53, 2**60, -(2**62)):
        assert Accepts({"const": number}, tokenizer, compiler)(number)
    accepts = Accepts({"type": "integer", "maximum": 2**63 - 1}, tokenizer, compiler)
    assert [accepts(2**63 - 2 + i) for i in range(3)] == [True, True, False]


def test_settings_of_the_compiler_are_not_the_client_s() -> None:
    assert "uniqueItems" in refusal(json={"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}})


def test_the_whole_message() -> None:
    schema = {"type": "array", "items": {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}}
    expected = "structured_outputs: not served in a JSON schema: uniqueItems (at #/items)"
    assert refusal(json=schema) == expected


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("a(b", "unclosed group"),
        ("[z-a]", "invalid character class range"),
        ("a{5,2}", "invalid repetition count range"),
        ("(?=x)", "look-around, including look-ahead and look-behind, is not supported"),
        (r"(a)\1", "backreferences are not supported"),
        ("x\ny(", "unclosed group"),
        ("x" * 2000 + "(", "unclosed group"),
    ],
)
def test_faults_of_a_regex_are_explained(expression: str, reason: str) -> None:
    for asked in (
        {"regex": expression},
        {"json": {"type": "string", "pattern": expression}},
        {"json": {"type": "object", "patternProperties": {expression: {}}}},
    ):
        message = refusal(**asked)
        assert f"regex parse error: {reason}" in message


def test_a_message_about_a_regex_shows_it() -> None:
    expected = 'structured_outputs: at 1(8): invalid regex "a(b" (in regex): regex parse error: unclosed group'
    assert refusal(regex="a(b") == expected
    expected = "structured_outputs: regex parse error: unclosed group in a(b"
    assert refusal(json={"type": "string", "pattern": "a(b"}) == expected


def test_deep_and_wide_schemas_end() -> None:
    assert "nested too deeply" in refusal(json='{"items":' * 5000 + "{}" + "}" * 5000)
    assert "not a JSON schema" in refusal(json="{")
    nested: Any = {"type": "integer"}
    for _ in range(30):
        nested = {"type": "object", "propertyNames": {"enum": list("abcdefgh")}, "additionalProperties": nested}
    assert len(compiled(nested)) < 20_000


@given(
    schema=st.recursive(st.none() | st.text(max_size=4), lambda each: st.lists(each) | st.dictionaries(st.text(), each))
)
@examples(25, 100)
def test_a_schema_that_exceeds_a_limit_does_so_as_text(schema: Any) -> None:
    length = len(json.dumps(schema, ensure_ascii=False, separators=(",", ":")))
    assert not exceeds(schema, length)
    assert exceeds([schema, "x" * 10], 10)


@pytest.mark.parametrize("schema", [{"properties": {f"a{i}": {} for i in range(200_000)}}, {"enum": ["x" * 70_000]}])
def test_a_large_schema_is_refused_before_it_is_walked(schema: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(structured, "rewrite", never)
    for asked in (schema, json.dumps(schema)):
        assert refusal(json=asked) == "structured_outputs: more than 65536 characters"


@pytest.mark.parametrize(
    ("names", "lengths"),
    [
        ({"minLength": 2}, range(2, 7)),
        ({"maxLength": 2, "type": "string"}, range(3)),
        ({"minLength": 2, "maxLength": 3, "title": "x"}, range(2, 4)),
        ({"minLength": 0}, range(7)),
        ({"$ref": "#/$defs/name"}, range(1, 7)),
    ],
)
def test_names_of_a_length(names: Any, lengths: range, tokenizer: Tokenizer, compiler: LLTokenizer) -> None:
    schema = {"propertyNames": names, "additionalProperties": {"type": "integer"}, "$defs": {"name": {"minLength": 1}}}
    accepts = Accepts({"type": "object", **schema}, tokenizer, compiler)
    for letter in ("a", "\n", '"'):
        for length in range(7):
            assert accepts({letter * length: 1}) == (length in lengths)
            assert not accepts({letter * length: "1"})
    assert accepts({})


def test_a_schema_that_is_a_boolean(tokenizer: Tokenizer, compiler: LLTokenizer) -> None:
    values: list[Any] = [1, "a", None, [True], {"a": {}}]
    for schema in (True, "true"):
        accepts = Accepts(schema, tokenizer, compiler)
        for value in values:
            assert accepts(value)
    for schema in (False, "false"):
        assert refusal(json=schema) == "structured_outputs: not a JSON schema: false matches nothing"
    assert refusal(json="[1]") == "structured_outputs: not a JSON schema: expected an object"


def test_objects_are_closed_where_nothing_is_said_of_other_properties() -> None:
    inner = {"type": "object", "properties": {"b": {"type": "integer"}}}
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {"a": copy.deepcopy(inner), "list": {"type": "array", "items": {"$ref": "#/$defs/x"}}},
        "$defs": {"x": copy.deepcopy(inner), "open": {**copy.deepcopy(inner), "additionalProperties": True}},
    }
    close_objects(schema)
    assert schema["additionalProperties"] is False
    assert schema["properties"]["a"]["additionalProperties"] is False
    assert schema["$defs"]["x"]["additionalProperties"] is False
    assert schema["$defs"]["open"]["additionalProperties"] is True
    assert schema["properties"]["list"] == {"type": "array", "items": {"$ref": "#/$defs/x"}}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object"},
        {"properties": {"a": {}}, "minProperties": 2},
        {"properties": {"a": {}}, "patternProperties": {"^x": {}}},
        {"properties": {"a": {}}, "$ref": "#/$defs/x", "$defs": {"x": {"type": "object"}}},
        {"properties": {"a": {}}, "$ref": "#/$defs/x", "$defs": {"x": {"properties": {"b": {}}}}},
        {"required": ["a"], "$ref": "#/$defs/x", "$defs": {"x": {"properties": {"b": {}}}}},
        {"patternProperties": {"^a": {}}, "anyOf": [{"properties": {"b": {}}}]},
        {"properties": {"a": {}}, "anyOf": [{"properties": {"b": {}}}]},
        {"anyOf": [{"properties": {"b": {}}}], "oneOf": [{"properties": {"c": {}}}]},
        {"items": {"properties": {"a": {}}, "oneOf": [{"properties": {"b": {}}}, {"properties": {"c": {}}}]}},
        {"properties": {"a": {}}, "required": ["b"]},
        {"allOf": [{"$ref": "#/$defs/x"}], "properties": {"a": {}}, "$defs": {"x": {"properties": {"b": {}}}}},
        {"const": {"properties": {"a": 1}}},
        True,
    ],
)
def test_objects_that_other_keywords_describe_stay_open(schema: Any) -> None:
    before = copy.deepcopy(schema)
    close_objects(schema)
    assert schema == before
