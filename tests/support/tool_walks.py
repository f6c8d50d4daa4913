"""Random functions, and random answers that match a grammar of calls."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken, Tokenizer

from server.text.tools.functions import Function
from server.text.tools.tool_format import CallParser, CallPart, Part, ToolFormat
from tests.support.profiles import is_all
from tests.support.schemas import random_schema
from tests.support.tiny import write_tokenizer

_NAMES = ("get", "getx", "get.x", "Get_9", "a-b", "f")
_CLOSING = tuple('"}]>')
_MAX_STEPS = 4000


@st.composite
def functions(draw: st.DrawFn, *, strict: bool = False) -> list[Function]:
    """Draw one function or several, now and then one without parameters."""
    chance = random.Random(draw(st.integers(0, 2**32)))
    names = chance.sample(_NAMES, chance.choice([1, 1, 2, 3]))
    return [Function(name, random_schema(chance) if chance.random() < 0.9 else {}, strict=strict) for name in names]


def write_tool_tokenizer(directory: Path, names: Sequence[str], *, special: bool) -> Path:
    """Write a tokenizer that has `names` as tokens. Returns its file."""
    write_tokenizer(directory)
    file = directory / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokens = [AddedToken(name, special=special, normalized=False) for name in names]
    (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(tokens)
    tokenizer.save(str(file))
    return file


class Walker:
    """Walks through grammars with the tokens of one tokenizer."""

    def __init__(self, file: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(file))
        self._compiler = LLTokenizer(str(file), n_vocab=self._tokenizer.get_vocab_size(), eos_token=[2])

    def matches(self, grammar: str, *pieces: str, spelled: bool = False) -> bool:
        """Whether a text, whose pieces are encoded one by one, is a whole answer. spelled: in tokens of a character
        each."""
        matcher = LLMatcher(self._compiler, grammar, log_level=0)
        tokens = [token for piece in ("".join(pieces) if spelled else pieces) for token in self._encode(piece)]
        return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()

    def rolls_back(self, grammar: str) -> bool:
        """Whether matchers of a grammar can take tokens back."""
        matcher = LLMatcher(self._compiler, grammar, log_level=0)
        before = matcher.compute_bitmask()
        words = np.frombuffer(before, dtype=np.uint8)
        token = int(np.flatnonzero(np.unpackbits(words, bitorder="little"))[-1])
        assert matcher.consume_token(token)
        matcher.rollback(1)
        return not matcher.is_error() and matcher.compute_bitmask() == before

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def walk(self, grammar: str, chance: random.Random, begin: str = "") -> str:
        """Return a random answer that begins with `begin`."""
        matcher = LLMatcher(self._compiler, grammar, log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        tokens = self._encode(begin)
        assert matcher.try_consume_tokens(tokens) == len(tokens), begin
        closing = {self._tokenizer.token_to_id(char) for char in _CLOSING}
        while not matcher.is_stopped():
            assert len(tokens) < _MAX_STEPS
            if matcher.is_accepting() and chance.random() < 0.3:
                break
            words = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
            allowed = [int(token) for token in np.flatnonzero(np.unpackbits(words, bitorder="little")) if token != 2]
            ending = [token for token in allowed if token in closing]
            token = chance.choice(ending if ending and chance.random() < len(tokens) / 200 else allowed)
            assert matcher.consume_token(token)
            tokens.append(token)
        return self._tokenizer.decode(tokens, skip_special_tokens=False)


def parse(parser: CallParser, pieces: Sequence[str]) -> list[Part]:
    """Parse an answer that arrives in pieces. Returns the parts, joined as far as they belong together."""
    joined: list[Part] = []
    for part in [*(part for piece in pieces for part in parser.feed(piece)), *parser.finish()]:
        last = joined[-1] if joined else None
        if isinstance(part, str) and isinstance(last, str):
            joined[-1] = last + part
        elif isinstance(part, CallPart) and isinstance(last, CallPart) and part.index == last.index:
            assert part.name is None
            joined[-1] = CallPart(last.index, last.name, last.arguments + part.arguments)
        else:
            joined.append(part)
    return joined


def check_calls(parts: Sequence[Part], offered: Sequence[Function]) -> list[tuple[str, Any]]:
    """Check that calls match their functions. Returns names and arguments."""
    schemas = {function.name: function.parameters for function in offered}
    found = []
    for index, part in enumerate(part for part in parts if isinstance(part, CallPart)):
        assert part.index == index
        assert part.name is not None
        arguments = json.loads(part.arguments)
        jsonschema.validate(arguments, schemas[part.name] or {"maxProperties": 0})
        found.append((part.name, arguments))
    return found


Call = tuple[str, str]
"""Name and arguments of a call, as JSON."""


def check_parser(form: ToolFormat, answer: str, expected: Sequence[str | Call], encode: Callable[[str], Any]) -> None:
    """Check what is parsed from an answer, however it is split. encode: returns the texts of its tokens."""
    calls = [Function(name, parameters) for name, parameters in OFFERED.items()]
    parts: list[Part] = []
    for each in expected:
        index = sum(isinstance(part, CallPart) for part in parts)
        parts.append(each if isinstance(each, str) else CallPart(index, *each))
    half = len(answer) // 2 + 1
    splits = [[answer], list(answer), encode(answer), ["", answer, ""]]
    splits += [[answer[:1], *(answer[1 + 2 * i : 3 + 2 * i] for i in range(half))]]
    splits += [[answer[2 * i : 2 * i + 2] for i in range(half)]]
    for width in (0, 1, 2) if is_all() else (1,):
        splits += [[answer[:i], answer[i : i + width], answer[i + width :]] for i in range(len(answer))]
    for pieces in splits:
        assert parse(form.parser(calls), pieces) == parts, pieces


OFFERED: dict[str, dict[str, Any]] = {
    "get_weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "unit": {"$ref": "#/$defs/Unit"},
            "where": {"type": "object"},
            "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "exact": {"type": "boolean"},
        },
        "required": ["city"],
        "$defs": {"Unit": {"enum": ["C", "F"]}},
    },
    "now": {},
    "a.b-c_1": {"type": "object", "properties": {"x": {"type": "array", "items": {}}}},
}
"""Parameters of the functions that answers may call, by name."""
