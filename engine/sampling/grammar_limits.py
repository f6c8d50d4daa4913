"""Limits of grammars, and their compiler's errors, for validation and for matching alike. Free of torch."""

from __future__ import annotations

from llguidance import LLParserLimits

MAX_ITEMS = 400
"""Largest number of rules that may hold at one place of the output. Each byte costs up to the square of it: right
recursion adds one per step. An object has four per property that may be left out, a choice of functions one each."""
LIMITS = LLParserLimits(
    max_grammar_size=100_000, initial_lexer_fuel=500_000, max_items_in_row=MAX_ITEMS, verbose_errors=False
)
"""Bounds the cost of compiling a grammar to some 100 ms, during which the rows of its round wait, and that of replaying
2000 bytes of output after a preemption to 500 ms."""
MAX_FORCED_BYTES = 2**14
"""Largest length of a text that a grammar forces at once. Each mask inside one walks through all of it: some 4 ms."""
_MAX_ERROR = 200


def describe_grammar_error(error: str) -> str:
    """Return the compiler's error on one line, without its state."""
    shown = error.partition("<state>")[0].partition("<non-verbose")[0]
    text = " ".join(shown.split()) or "unknown error"
    if text.startswith("NoExtension"):
        text = "it matches no text"
    return text if len(text) <= _MAX_ERROR else text[: _MAX_ERROR - 1] + "…"
