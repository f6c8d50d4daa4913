"""Convert `response_format` and `structured_outputs` to the grammar that the output must match."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import msgspec
from llguidance import LLMatcher, LLTokenizer, grammar_from
from pydantic import ConfigDict, Field

from engine.sampling.grammar_limits import LIMITS, MAX_FORCED_BYTES, MAX_ITEMS
from server.bodies.strict import Body, NotServed
from server.errors import ApiError
from server.limits import MAX_CHOICE_CHARS, MAX_GRAMMAR_CHARS, MAX_GRAMMAR_CHOICES
from server.text.json_schema import UnservedSchemaError, exceeds, rewrite
from server.text.special_names import check_names, check_names_in_grammar

WHITESPACE = r"[\x20\x0A\x09]{0,20}"
"""Whitespace allowed between the parts of JSON. Bounded: an uncertain model writes spaces and would never stop."""

_BYTES = LLTokenizer("byte")
"""A token per byte, with which a grammar shows whether any text can begin."""


@dataclass(frozen=True, slots=True)
class Grammar:
    """A grammar in the compiler's format.

    param: the request field that asks for it. places: where each keyword of its JSON schema occurs first.
    """

    param: str
    text: str
    places: Mapping[str, str] = field(default_factory=dict)


class JsonSchema(Body):
    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    content: Annotated[dict[str, Any] | bool | None, Field(alias="schema")] = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def grammar(self, special_names: Collection[str] = ()) -> Grammar | None:
        """Return the grammar; None for text. Raises ApiError."""
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise _wrong("response_format", "json_schema goes with the type json_schema")
        if self.type == "text":
            return None
        schema = {"type": "object"} if self.json_schema is None else self.json_schema.content
        if schema is None:
            raise _wrong("response_format", "json_schema has no schema")
        return _of_schema("response_format", schema, special_names)


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

    def compiled(self, special_names: Collection[str] = (), bad_words: Collection[str] = ()) -> Grammar:
        """Return the grammar. A choice that contains one of `bad_words` is none. Raises ApiError."""
        param = "structured_outputs"
        given = [self.content, self.regex, self.choice, self.grammar, self.json_object or None]
        if sum(each is not None for each in given) != 1:
            raise _wrong(param, "expected one of json, regex, choice, grammar and json_object")
        if self.content is not None:
            return _of_schema(param, self.content, special_names)
        if self.json_object:
            return _of_schema(param, {"type": "object"}, special_names)
        if self.regex is not None:
            check_names(param, "the regex", (), special_names, [self.regex])
            return Grammar(param, grammar_from("regex", _short(param, self.regex)))
        if self.choice is not None:
            if not all(self.choice) or sum(map(len, self.choice)) > MAX_CHOICE_CHARS:
                raise _wrong(param, f"expected choices that are not empty, of {MAX_CHOICE_CHARS} characters in all")
            check_names(param, "a choice", self.choice, special_names)
            left = [each for each in self.choice if not any(word in each for word in bad_words)]
            if not left:
                reason = "bad_words and structured_outputs.choice: together they exclude every choice"
                raise ApiError(reason, param="bad_words")
            return Grammar(param, "start: " + " | ".join(msgspec.json.encode(each).decode() for each in left))
        assert self.grammar is not None
        check_names_in_grammar(param, self.grammar, special_names)
        try:
            return Grammar(param, grammar_from("grammar", _short(param, self.grammar)))
        except (ValueError, RecursionError) as error:
            raise _wrong(param, str(error) or "the grammar is nested too deeply") from None


def grammar_of(
    response_format: ResponseFormat | None,
    structured: StructuredOutputs | None,
    special_names: Collection[str] = (),
    bad_words: Collection[str] = (),
) -> Grammar | None:
    """Return the grammar that the output must match, not validated yet; None: unconstrained. Raises ApiError.

    special_names: of the model's special tokens. bad_words: as the request has them.
    """
    asked = response_format.grammar(special_names) if response_format else None
    if structured is not None:
        if asked is not None:
            raise _wrong("structured_outputs", "give either this or response_format")
        return structured.compiled(special_names, bad_words)
    return asked


def check_grammar(grammar: Grammar) -> None:
    """Validate `grammar` by compiling it. Raises ApiError."""
    matcher = LLMatcher(_BYTES, grammar.text, log_level=0, limits=LIMITS)
    if matcher.is_error():  # also where the grammar has tokens of the model, which are not known here
        wrong, said = LLMatcher.validate_grammar_with_warnings(grammar.text, None, limits=LIMITS)
        if wrong:
            raise _wrong(grammar.param, _reason(said[0], grammar.places) if said else "not a grammar")
        return
    forced = matcher.compute_ff_bytes()
    if len(forced) > MAX_FORCED_BYTES:
        raise _wrong(grammar.param, f"the grammar forces a text of more than {MAX_FORCED_BYTES} bytes")
    matcher.compute_bitmask()
    if "NoExtension" in matcher.get_error():
        raise _wrong(grammar.param, "the grammar matches no text")
    matcher.try_consume_tokens(list(forced))
    matcher.compute_bitmask()
    if "items; max is" in matcher.get_error():
        reason = f"more than {MAX_ITEMS} rules of the grammar hold at one place, such as in an object with more than "
        raise _wrong(grammar.param, f"{reason}{MAX_ITEMS // 4 - 5} properties that may be left out")


def compilable(param: str, schema: Any, special_names: Collection[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Rewrite a client's schema for the compiler. Returns also where each keyword occurs first. Raises ApiError.

    schema: as JSON, if it is a string.
    """
    if exceeds(schema, MAX_GRAMMAR_CHARS):
        raise _too_long(param)
    with _schema_errors(param):
        content = json.loads(schema) if isinstance(schema, str) else schema
        if content is False:
            raise ValueError("false matches nothing")
        if not isinstance(content, dict | bool):
            raise ValueError("expected an object")
        rewritten = rewrite({} if content is True else content)
    part = "a value, pattern or property name of the JSON schema"
    check_names(param, part, rewritten.literals, special_names, rewritten.patterns)
    return rewritten.schema, rewritten.places


def _of_schema(param: str, schema: Any, special_names: Collection[str]) -> Grammar:
    """schema: as JSON, if it is a string."""
    rewritten, places = compilable(param, schema, special_names)
    with _schema_errors(param):
        text = _short(param, json.dumps(rewritten, ensure_ascii=False))
        compiled = LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": WHITESPACE})
    return Grammar(param, compiled, places)


@contextmanager
def _schema_errors(param: str) -> Iterator[None]:
    try:
        yield
    except UnservedSchemaError as error:
        raise _wrong(param, f"not served in a JSON schema: {error}") from None
    except ValueError as error:
        raise _wrong(param, f"not a JSON schema: {error}") from None
    except RecursionError:
        raise _wrong(param, "the JSON schema is nested too deeply") from None


def _reason(said: str, places: Mapping[str, str]) -> str:
    """Return the compiler's reason on one line that fits into a message. places: of keywords in the schema."""
    first, *lines = said.partition("<state>")[0].split("\n")
    if first.endswith("regex parse error:"):
        # Then come the expression, a line that points into it, and the reason.
        end = next((i for i, line in enumerate(lines) if line.startswith("error: ")), 0)
        first += lines[end].removeprefix("error:")
        if said.startswith("regex"):
            first += f" in {_cut(' '.join(lines[:end]).strip(' ^'))}"
    if unserved := re.search(r"Unimplemented keys: (\[.*\])", first):
        keys = msgspec.json.decode(unserved[1], type=list[str])
        first = "not served in a JSON schema: " + ", ".join(f"{key}{_at(key, places)}" for key in keys)
    elif "Regex is empty" in first:
        first = "the JSON schema matches nothing: no string has both the pattern or format and the length"
    elif first.startswith("oneOf"):
        first = f"oneOf{_at('oneOf', places)} is served only if its alternatives exclude each other; try anyOf"
    elif first.startswith("min/maxProperties"):
        limit = next((key for key in ("minProperties", "maxProperties") if key in places), "min/maxProperties")
        first = f"{limit}{_at(limit, places)} is served only if all of the object's properties are required"
    return _cut(first)


def _at(keyword: str, places: Mapping[str, str]) -> str:
    return f" (at {_cut(places[keyword])})" if keyword in places else ""


def _cut(text: str, limit: int = 400) -> str:
    """Shorten a text in its middle: the compiler quotes first and gives its reason last."""
    return text if len(text) <= limit else f"{text[: limit // 2]}…{text[-limit // 2 :]}"


def _short(param: str, text: str) -> str:
    if len(text) > MAX_GRAMMAR_CHARS:
        raise _too_long(param)
    return text


def _too_long(param: str) -> ApiError:
    return _wrong(param, f"more than {MAX_GRAMMAR_CHARS} characters")


def _wrong(param: str, reason: str) -> ApiError:
    return ApiError(f"{param}: {reason}", param=param)
