"""Convert `response_format` and `structured_outputs` to the grammar that the output must match."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

import msgspec
from llguidance import LLMatcher, grammar_from
from pydantic import ConfigDict, Field

from engine.sampling.grammar_limits import LIMITS
from server.bodies.strict import Body, NotServed
from server.errors import ApiError
from server.limits import MAX_CHOICE_CHARS, MAX_GRAMMAR_CHARS, MAX_GRAMMAR_CHOICES

_WHITESPACE = r"[\x20\x0A\x09]{0,20}"
"""Whitespace allowed between the parts of JSON. Bounded: an uncertain model writes spaces and would never stop."""


class JsonSchema(Body):
    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    content: Annotated[dict[str, Any] | bool | None, Field(alias="schema")] = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def grammar(self) -> str | None:
        """Return the grammar; None for text. Raises ApiError."""
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise _wrong("response_format", "json_schema goes with the type json_schema")
        if self.type == "text":
            return None
        schema = {"type": "object"} if self.json_schema is None else self.json_schema.content
        if schema is None:
            raise _wrong("response_format", "json_schema has no schema")
        return _of_schema("response_format", msgspec.json.encode(schema).decode())


class StructuredOutputs(Body):
    """Constraint on the output: exactly one of `json`, `regex`, `choice`, `grammar` and `json_object`."""

    model_config = ConfigDict(protected_namespaces=())

    content: Annotated[dict[str, Any] | bool | str | None, Field(alias="json")] = None
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1, max_length=MAX_GRAMMAR_CHOICES)] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    disable_any_whitespace: NotServed = None
    disable_additional_properties: NotServed = None
    disable_fallback: NotServed = None
    structural_tag: NotServed = None
    whitespace_pattern: NotServed = None

    def compiled(self) -> str:
        """Return the grammar. Raises ApiError."""
        param = "structured_outputs"
        given = [self.content, self.regex, self.choice, self.grammar, self.json_object or None]
        if sum(each is not None for each in given) != 1:
            raise _wrong(param, "expected one of json, regex, choice, grammar and json_object")
        if self.content is not None:
            text = self.content if isinstance(self.content, str) else msgspec.json.encode(self.content).decode()
            return _of_schema(param, text)
        if self.json_object:
            return _of_schema(param, '{"type": "object"}')
        if self.regex is not None:
            return grammar_from("regex", _short(param, self.regex))
        if self.choice is not None:
            if not all(self.choice) or sum(map(len, self.choice)) > MAX_CHOICE_CHARS:
                raise _wrong(param, f"expected choices that are not empty, of {MAX_CHOICE_CHARS} characters in all")
            return "start: " + " | ".join(msgspec.json.encode(each).decode() for each in self.choice)
        assert self.grammar is not None
        try:
            return grammar_from("grammar", _short(param, self.grammar))
        except (ValueError, RecursionError) as error:
            raise _wrong(param, str(error) or "the grammar is nested too deeply") from None


def grammar_of(response_format: ResponseFormat | None, structured: StructuredOutputs | None) -> tuple[str, str] | None:
    """Return the requesting field and its grammar, not validated yet; None: unconstrained. Raises ApiError."""
    asked = response_format.grammar() if response_format else None
    if structured is not None:
        if asked is not None:
            raise _wrong("structured_outputs", "give either this or response_format")
        return "structured_outputs", structured.compiled()
    return None if asked is None else ("response_format", asked)


async def check_grammar(param: str, grammar: str) -> None:
    """Validate `grammar` by compiling once, off the event loop: bounded work, up to some 100 ms. Raises ApiError."""
    wrong, said = await asyncio.to_thread(LLMatcher.validate_grammar_with_warnings, grammar, None, limits=LIMITS)
    if wrong:
        raise _wrong(param, said[0].partition("\n")[0] if said else "not a grammar")


def _of_schema(param: str, schema: str) -> str:
    try:
        return LLMatcher.grammar_from_json_schema(_short(param, schema), overrides={"whitespace_pattern": _WHITESPACE})
    except ValueError as error:
        raise _wrong(param, f"not a JSON schema: {error}") from None


def _short(param: str, text: str) -> str:
    if len(text) > MAX_GRAMMAR_CHARS:
        raise _wrong(param, f"more than {MAX_GRAMMAR_CHARS} characters")
    return text


def _wrong(param: str, reason: str) -> ApiError:
    return ApiError(f"{param}: {reason}", param=param)
