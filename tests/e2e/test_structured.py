"""Structured output over HTTP, with speculation on and off."""

from __future__ import annotations

import asyncio
import json
import random
import re
from typing import Any, Literal

import httpx
import jsonschema
import openai
import pytest
from pydantic import BaseModel

from tests.support.profiles import is_all
from tests.support.schemas import random_schema
from tests.support.servers import PATIENCE_S, PLAIN, Server

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = [{"role": "user", "content": "Tell me about a person."}]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
VALID = jsonschema.Draft202012Validator(PERSON)
CHOICES = ["a cat", "a dog", 'a "bird"']
OFF = {"speculation": {"enabled": False}}


def schema_format(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


def text_of(server: Server, body: dict[str, Any]) -> str:
    answer = server.post(COMPLETIONS, {"prompt": "x", "max_tokens": 200, "seed": 1} | body)
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    assert choice["finish_reason"] == "stop"
    text: str = choice["text"]
    return text


@pytest.mark.parametrize(
    ("asked", "matches"),
    [
        ({"structured_outputs": {"regex": r"\d{3}-\d{4}"}}, lambda text: re.fullmatch(r"\d{3}-\d{4}", text)),
        (
            {"structured_outputs": {"choice": ["a cat", "a dog", 'a "bird"']}},
            ["a cat", "a dog", 'a "bird"'].__contains__,
        ),
        ({"structured_outputs": {"grammar": 'start: "x" | "y" start'}}, lambda text: re.fullmatch("y*x", text)),
        ({"structured_outputs": {"grammar": 'root ::= "a" root | "b"'}}, lambda text: re.fullmatch("a*b", text)),
        ({"structured_outputs": {"json": PERSON}}, lambda text: VALID.is_valid(json.loads(text))),
        ({"structured_outputs": {"json": json.dumps(PERSON)}}, lambda text: "name" in json.loads(text)),
        ({"response_format": schema_format(PERSON)}, lambda text: "age" in json.loads(text)),
    ],
)
def test_every_kind(tiny: Server, asked: dict[str, Any], matches: Any) -> None:
    for seed in range(3 if is_all() else 1):
        text = text_of(tiny, asked | {"seed": seed})
        assert matches(text)
        assert text_of(tiny, asked | {"seed": seed} | OFF) == text


def test_any_object(server: Server) -> None:
    for asked in ({"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}):
        body = {"prompt": 'As JSON: {"name": "Ann", "age": 5}\nAs JSON:', "temperature": 0, **asked}
        assert isinstance(json.loads(text_of(server, body).strip()), dict)


def test_random_schemas(tiny: Server) -> None:
    """All outputs parse and match their schemas, and equal those without speculation."""
    schemas = [random_schema(random.Random(1000 + i)) for i in range(200 if is_all() else 30)]

    async def ask(http: httpx.AsyncClient, seed: int, schema: Any, others: dict[str, Any]) -> str:
        body = {
            "prompt": [5 + seed],
            "max_tokens": 2000,
            "seed": seed,
            "structured_outputs": {"json": schema},
            **others,
        }
        answer = await http.post(COMPLETIONS, json=body | others)
        assert answer.status_code == 200, answer.text
        (choice,) = answer.json()["choices"]
        assert choice["finish_reason"] == "stop"
        text: str = choice["text"]
        return text

    async def main() -> list[list[str]]:
        limits = httpx.Limits(max_connections=20)
        async with httpx.AsyncClient(base_url=tiny.url, limits=limits, **PLAIN) as http:
            return [
                await asyncio.gather(*(ask(http, seed, schema, others) for seed, schema in enumerate(schemas)))
                for others in ({"speculation": {"max_draft_tokens": 3}}, OFF)
            ]

    drafted, plain = asyncio.run(main())
    assert drafted == plain
    for text, schema in zip(drafted, schemas, strict=True):
        jsonschema.validate(json.loads(text), schema)


class Animal(BaseModel):
    kind: Literal["cat", "dog"]
    legs: Literal[3, 4]


def test_openai_parses_models(server: Server) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=PATIENCE_S, max_retries=0) as client:
        answer = client.chat.completions.parse(
            model="default",
            messages=[{"role": "user", "content": "Name an animal."}],
            response_format=Animal,
            temperature=0,
            max_completion_tokens=100,
        )
        animal = answer.choices[0].message.parsed
        assert animal is not None
        assert animal.kind in ("cat", "dog")


@pytest.mark.parametrize(
    "asked",
    [
        {"response_format": {"type": "xml"}},
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "json_object", "json_schema": {"schema": {}}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        {"response_format": schema_format({"type": "strin"})},
        {"response_format": schema_format({"type": "object", "if": {}, "then": False})},
        {"response_format": schema_format({"type": "string", "pattern": "a" * 70000})},
        {"response_format": schema_format({"$ref": "http://example.org/schema"})},
        {"response_format": schema_format([1])},
        {"structured_outputs": {}},
        {"structured_outputs": {"regex": "a", "choice": ["b"]}},
        {"structured_outputs": {"json_object": False}},
        {"structured_outputs": {"regex": "a(b"}},
        {"structured_outputs": {"choice": []}},
        {"structured_outputs": {"choice": [""]}},
        {"structured_outputs": {"choice": ["x" * 20000]}},
        {"structured_outputs": {"grammar": "start: nothing"}},
        {"structured_outputs": {"grammar": "start: " + "(" * 5000 + '"a"' + ")" * 5000}},
        {"structured_outputs": {"grammar": 'root ::= "a" ::= '}},
        {"structured_outputs": {"json": "no schema"}},
        {"structured_outputs": {"json": {}}, "response_format": {"type": "json_object"}},
        {"structured_outputs": {"regex": "a", "whitespace_pattern": "x"}},
        {"structured_outputs": {"regex": "a", "nonsense": 1}},
        {"allowed_token_ids": []},
        {"allowed_token_ids": [320]},
        {"bad_words": [""]},
        {"bad_words": "x"},
        {"priority": "high"},
    ],
)
def test_what_is_none_is_refused(tiny: Server, asked: dict[str, Any]) -> None:
    answer = tiny.post(COMPLETIONS, {"prompt": "x", **asked})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"].split(".")[0] in asked
    assert len(error["message"]) <= 500
    assert tiny.post(COMPLETIONS, {"prompt": "x", "max_tokens": 1}).status_code == 200


def test_words_and_tokens(tiny: Server) -> None:
    body = {"prompt": "x", "max_tokens": 40, "temperature": 2, "ignore_eos": True, "seed": 3}
    letters = [tiny.post("/tokenize", {"prompt": letter}).json()["tokens"][0] for letter in "abc"]
    only = tiny.post(COMPLETIONS, {**body, "allowed_token_ids": letters}).json()["choices"][0]["text"]
    assert set(only) == set("abc")
    never = tiny.post(COMPLETIONS, {**body, "allowed_token_ids": letters, "bad_words": ["ab", "c"]}).json()
    text = never["choices"][0]["text"]
    assert set(text) == set("ab")
    assert "ab" not in text


def test_priorities_are_taken(tiny: Server) -> None:
    assert tiny.post(COMPLETIONS, {"prompt": "x", "max_tokens": 1, "priority": -5}).status_code == 200
