"""Grammars of requests: where they are converted, and what is refused beforehand."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.bodies import fields
from server.errors import ApiError
from server.text.special_names import check_names
from server.text.structured import Grammar, check_grammar
from tests.support.app import server
from tests.support.contract import COMPLETIONS


def ask(directory: Path, asked: dict[str, Any]) -> tuple[httpx.Response, list[str | None]]:
    """Send a completion. Returns the answer, and the grammar that the engine gets, if it gets the request."""

    async def main() -> tuple[httpx.Response, list[str | None]]:
        async with server(directory) as (http, client, _):
            answer = await http.post(COMPLETIONS, json={"prompt": [10], "max_tokens": 2, **asked})
            return answer, [request.params.grammar for request in client.requests]

    return asyncio.run(main())


def grammar_for(directory: Path, **asked: Any) -> str | None:
    answer, (grammar,) = ask(directory, asked)
    assert answer.status_code == 200, answer.text
    return grammar


def refusal(directory: Path, **asked: Any) -> tuple[str, str]:
    """Return param and message of the error."""
    answer, grammars = ask(directory, asked)
    assert (answer.status_code, grammars) == (400, [])
    error = answer.json()["error"]
    return error["param"], error["message"]


@pytest.mark.parametrize(
    "asked", [{"response_format": {"type": "json_object"}}, {"structured_outputs": {"grammar": 'root ::= "a"'}}]
)
def test_grammars_are_converted_off_the_event_loop(
    directory: Path, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []

    def watched(grammar: Grammar) -> None:
        threads.append(threading.current_thread())
        check_grammar(grammar)

    monkeypatch.setattr(fields, "check_grammar", watched)
    assert grammar_for(directory, **asked) is not None
    (thread,) = threads
    assert thread is not threading.current_thread()
    assert grammar_for(directory, response_format={"type": "text"}) is None


@pytest.mark.parametrize(
    ("words", "left"),
    [
        ([], ["yes", "no", "not now"]),
        (["no"], ["yes"]),
        (["now"], ["yes", "no"]),
        ([" no", "yes!"], ["yes", "no"]),
        (["o", "x"], ["yes"]),
    ],
)
def test_choices_with_bad_words_are_none(directory: Path, words: list[str], left: list[str]) -> None:
    grammar = grammar_for(directory, bad_words=words, structured_outputs={"choice": ["yes", "no", "not now"]})
    assert grammar == "start: " + " | ".join(f'"{choice}"' for choice in left)


def test_bad_words_that_leave_no_choice(directory: Path) -> None:
    param, message = refusal(directory, bad_words=["yes", "no"], structured_outputs={"choice": ["yes", "no"]})
    assert param == "bad_words"
    assert message == "bad_words and structured_outputs.choice: together they exclude every choice"


def schema_format(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


@pytest.mark.parametrize(
    "schema",
    [
        {"const": "<|im_end|>"},
        {"const": {"a": ["b<|im_end|>"]}},
        {"enum": ["a", "<|im_end|>"]},
        {"properties": {"a<|im_end|>": {}}},
        {"required": ["<|im_end|>"]},
        {"items": {"anyOf": [{"type": "integer"}, {"const": "<|im_end|>"}]}},
        {"propertyNames": {"enum": ["<|im_end|>"]}},
        {"type": "string", "pattern": r"^a<\|im_end\|>b$"},
        {"patternProperties": {r"^<\|im_end\|>$": {}}},
        {"$ref": "#/$defs/g/x", "$defs": {"g": {"x": {"enum": ["<|im_end|>"]}}}},
        {"$ref": "#/components/x", "components": {"x": {"properties": {"<|im_end|>": {}}}}},
        {"type": "string", "pattern": r"^(<)\|im_end\|>$"},
        {"type": "string", "pattern": r"^<\x7cim_end\|>$"},
    ],
)
def test_schemas_that_prescribe_a_special_token(directory: Path, schema: Any) -> None:
    reason = "a value, pattern or property name of the JSON schema contains the name of a special token, <|im_end|>"
    assert refusal(directory, **schema_format(schema)) == ("response_format", f"response_format: {reason}")


def test_names_in_brackets_are_told_from_words() -> None:
    def found(*regexes: str) -> list[bool]:
        served = []
        for regex in regexes:
            try:
                check_names("p", "the regex", (), ["[INST]"], [regex])
            except ApiError:
                served.append(True)
            else:
                served.append(False)
        return served

    assert found(r"\[INST\]", "[[]INST[\\]]", r"(\x5b)INST\]") == [True] * 3
    assert found("INST[0-9]", r"(INST)\]", "[INS]T") == [False] * 3


def test_a_format_that_is_a_boolean(directory: Path) -> None:
    assert grammar_for(directory, **schema_format(True)) == grammar_for(directory, **schema_format({}))
    assert refusal(directory, **schema_format(False))[0] == "response_format"


@pytest.mark.parametrize("choice", ["<|im_end|>", "a<|im_end|>b"])
def test_choices_that_contain_a_special_token(directory: Path, choice: str) -> None:
    param, message = refusal(directory, structured_outputs={"choice": ["x", choice]})
    assert param == "structured_outputs"
    assert message == "structured_outputs: a choice contains the name of a special token, <|im_end|>"


@pytest.mark.parametrize(
    ("asked", "part"),
    [
        ({"regex": r"a<\|im_end\|>b"}, "the regex"),
        ({"regex": r"\x3c\|im_end\|\x3e"}, "the regex"),
        ({"regex": r"\u{3c}\u007cim_end\U0000007C>"}, "the regex"),
        ({"regex": "<[|]im_end[\\|]>"}, "the regex"),
        ({"regex": r"(?:<)(?P<x>\|)im_end{1}\|>"}, "the regex"),
        ({"grammar": r'start: "\u003c|im_end|>"'}, "a string or regex of the grammar"),
        ({"grammar": r'root ::= "\x3c|im_end|>"'}, "a string or regex of the grammar"),
        ({"grammar": r'start: %json {"pattern": "^<[|]im_end[|]>$"}'}, "a string or regex of the grammar"),
        ({"grammar": 'start: "a<|im_end|>b"'}, "a string or regex of the grammar"),
        ({"grammar": r"start: /a<\|im_end\|>/"}, "a string or regex of the grammar"),
    ],
)
def test_grammars_that_prescribe_a_special_token(directory: Path, asked: dict[str, str], part: str) -> None:
    _, message = refusal(directory, structured_outputs=asked)
    assert message == f"structured_outputs: {part} contains the name of a special token, <|im_end|>"


def test_texts_that_are_forced_are_bounded(directory: Path) -> None:
    _, message = refusal(directory, structured_outputs={"regex": "(abc ){5000}"})
    assert message == "structured_outputs: the grammar forces a text of more than 16384 bytes"


@pytest.mark.parametrize(
    "asked",
    [
        {"structured_outputs": {"choice": ["<|im", "_end|>", "<|IM_END|>"]}},
        {"structured_outputs": {"regex": r"<[a-z|_]+>"}},
        {"structured_outputs": {"regex": r"\\x3c\|im_end\|>"}},
        {"structured_outputs": {"grammar": 'start: "<[|]im_end[|]>"'}},
        schema_format({"description": "<|im_end|>", "default": "<|im_end|>", "const": "x"}),
    ],
)
def test_other_texts_are_served(directory: Path, asked: dict[str, Any]) -> None:
    assert grammar_for(directory, **asked) is not None


@pytest.mark.parametrize(
    "asked",
    [
        *({"regex": regex} for regex in (r"[^\s\S]", r"[^\x00-\U0010ffff]", r"a[^\s\S]")),
        *({"grammar": grammar} for grammar in ("start: start", "start: b\nb: start", "start: A\nA: /a/ & /b/")),
        *({"json": schema} for schema in ({"$ref": "#"}, {"anyOf": [{"$ref": "#"}]})),
    ],
)
def test_grammars_that_match_no_text(directory: Path, asked: dict[str, Any]) -> None:
    message = "structured_outputs: the grammar matches no text"
    assert refusal(directory, structured_outputs=asked) == ("structured_outputs", message)


@pytest.mark.parametrize("more", [{}, {"additionalProperties": False}])
def test_wide_objects(directory: Path, more: dict[str, Any]) -> None:
    names = [f"a{i}" for i in range(300)]
    schema = {"type": "object", "properties": {name: {"type": "integer"} for name in names}, **more}
    assert grammar_for(directory, **schema_format({**schema, "required": names[95:]})) is not None
    _, message = refusal(directory, **schema_format({**schema, "required": names[150:]}))
    reason = "more than 400 rules of the grammar hold at one place, such as in an object with more than 95 properties"
    assert message == f"response_format: {reason} that may be left out"


@pytest.mark.parametrize("regex", ["", "é", "[é-ü]", "[^a]", r"\xff"])
def test_grammars_that_match_some_text(directory: Path, regex: str) -> None:
    assert grammar_for(directory, structured_outputs={"regex": regex}) is not None


@pytest.mark.parametrize("grammar", ["start: <|im_end|>", 'start: "a" <[300]>', "start: <[*]>"])
def test_grammars_of_tokens(directory: Path, grammar: str) -> None:
    assert grammar_for(directory, structured_outputs={"grammar": grammar}) is not None


@pytest.mark.parametrize("schema", [{"pattern": "^a$", "minLength": 2}, {"format": "date", "maxLength": 3}])
def test_strings_that_cannot_be(directory: Path, schema: dict[str, Any]) -> None:
    _, message = refusal(directory, **schema_format({"type": "string", **schema}))
    reason = "the JSON schema matches nothing: no string has both the pattern or format and the length"
    assert message == f"response_format: {reason}"
