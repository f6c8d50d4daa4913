"""Limits of grammars, and their compiler's errors, for validation and for matching alike. Free of torch."""

from __future__ import annotations

from llguidance import LLParserLimits

LIMITS = LLParserLimits(max_grammar_size=100_000, initial_lexer_fuel=500_000, verbose_errors=False)
"""Bounds the cost of compiling a grammar to some 100 ms, during which the rows of its round wait."""
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
