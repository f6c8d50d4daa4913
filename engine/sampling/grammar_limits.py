"""Limits of grammars, for validation and for matching alike. Free of torch."""

from __future__ import annotations

from llguidance import LLParserLimits

LIMITS = LLParserLimits(max_grammar_size=100_000, initial_lexer_fuel=500_000)
"""Bounds the cost of compiling a grammar to some 100 ms, during which the rows of its round wait."""
