"""The slot of tool formats: how a family of models writes calls of functions.

A format is one file, and a line in `tool_registry`. It recognises its models by their chat template, says in a grammar
what calls look like, and parses them from text that arrives in pieces.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from server.text.tools.functions import Function


@dataclass(frozen=True, slots=True)
class CallPart:
    """Part of a call.

    index: number of the call in the answer, from 0. name: in the first part of each call, None in all others.
    arguments: JSON text, whose parts join to the whole.
    """

    index: int
    name: str | None = None
    arguments: str = ""


Part = str | CallPart
"""Part of an answer: text that belongs to no call, or part of a call."""


class CallParser(Protocol):
    """Parser of one answer. Its parts join to the same, wherever the text is split.

    Text that turns out to be no call is returned as text: nothing is lost. Text that may begin a call is held back
    until that is decided. Arguments are passed on as they come, once the name is known.
    """

    def feed(self, text: str) -> list[Part]:
        """Return what is certain after more text."""

    def finish(self) -> list[Part]:
        """Return what was held back, at the end of the text. A call that is incomplete then stays so."""


class GrammarWriter(Protocol):
    """Writes parts of a grammar in the compiler's notation (llguidance's variant of Lark)."""

    def text(self, text: str) -> str:
        """Write a fixed text. What the tokenizer encodes as one special token by its name is that token."""

    def json_parts(self, *parts: str) -> str:
        """Write a fixed text that is the beginning of JSON. parts: its signs, strings and spaces."""

    def arguments(self, function: Function) -> str:
        """Write the JSON of a function's arguments. Raises ApiError: their schema is not served."""

    def check(self, function: Function) -> None:
        """Raise ApiError if no format can write the function's arguments: their schema has names of special tokens."""

    def value(self, function: Function, schema: Mapping[str, Any]) -> str:
        """Write JSON that matches part of a function's schema. Raises ApiError: the schema is not served."""

    def rule(self, expression: str) -> str:
        """Define a rule, and return its name."""

    def terminal(self, expression: str) -> str:
        """Define a terminal, which may combine regexes, and return its name."""


class Headers(NamedTuple):
    """What an answer has before its text and before its calls, each as an expression of a grammar; empty: nothing."""

    text: str = ""
    calls: str = ""


NO_HEADERS = Headers()


class ToolFormat(Protocol):
    """How a family of models writes calls.

    name: value of the setting `server.tool_format` that selects it. markers: texts that only calls have. Where they are
    names of special tokens, answers show them only to its parser. trigger: text with which calls begin wherever they
    stand in an answer; empty: an answer that calls begins with the call. begin: the sign with which such calls begin,
    and text does not; empty: their beginning is no text.
    """

    name: str
    markers: frozenset[str]
    trigger: str
    begin: str

    def recognises(self, template: str) -> bool:
        """Whether a chat template is that of a model which writes this format."""

    def prepare(
        self, messages: Sequence[Mapping[str, Any]], functions: Sequence[Function]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
        """Return messages and tools as the model's template takes them; no tools: None."""

    def new_id(self) -> str:
        """Return an id for a call, in the form that the model's template accepts in later turns."""

    def calls(self, functions: Sequence[Function], write: GrammarWriter, *, parallel: bool) -> str:
        """Write a grammar's expression for what follows the trigger: one call, or with `parallel` one or more. In a
        format whose calls each have a trigger, it is one call. Raises ApiError: a schema is not served."""

    def parser(self, functions: Sequence[Function]) -> CallParser:
        """Create a parser. functions: those that may be called."""
