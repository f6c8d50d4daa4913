"""Grammars (llguidance): masks of the tokens that may follow in constrained output, the same on every rank.

A matcher's state is that after a row's committed tokens. For masks after drafts it advances over them, and rolls back.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from engine.plan import RowStart

log = logging.getLogger(__name__)

Words = npt.NDArray[np.int32]

LIMITS = LLParserLimits(max_grammar_size=100_000, initial_lexer_fuel=500_000)
"""Bounds the cost of compiling a grammar to some 100 ms, during which the rows of its round wait."""


class Grammars:
    """The grammars of all row slots of one rank."""

    def __init__(self, max_rows: int, tokenizer: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """tokenizer: the model's tokenizer.json; read when the first grammar arrives."""
        self._file = tokenizer
        self._vocab_size = vocab_size
        self._eos = list(eos_token_ids)
        self._tokenizer: LLTokenizer | None = None
        self._matchers: dict[int, LLMatcher] = {}
        self.constrained = np.zeros(max_rows, dtype=bool)
        """[max_rows]: rows that have a grammar."""

    def start(self, start: RowStart) -> None:
        """Start a request in a row slot."""
        row, grammar = start.row, start.params.grammar
        self._matchers.pop(row, None)
        self.constrained[row] = grammar is not None
        if grammar is not None:
            if self._tokenizer is None:
                self._tokenizer = self._read_tokenizer()
            self._matchers[row] = LLMatcher(self._tokenizer, grammar, log_level=0, limits=LIMITS)
            self.commit(row, start.tokens[start.num_prompt :])

    def _read_tokenizer(self) -> LLTokenizer:
        try:
            return LLTokenizer(str(self._file), n_vocab=self._vocab_size, eos_token=self._eos)
        except ValueError:  # it has more tokens than the model
            return LLTokenizer(str(self._file), eos_token=self._eos)

    def commit(self, row: int, tokens: Sequence[int]) -> None:
        """Advance a row's matcher over its output; a row without a grammar keeps no state."""
        if (matcher := self._matchers.get(row)) is None:
            return
        consumed = matcher.try_consume_tokens(list(tokens))
        # Tokens after the grammar's end, such as an end of sequence, do not advance the matcher.
        if matcher.is_error() or (consumed < len(tokens) and not matcher.is_stopped()):
            log.error("a grammar failed; its output ends here: %s", matcher.get_error() or "a token does not match")

    def masks(self, row: int, drafted: Sequence[int], first: int = 0) -> Words:
        """Compute the tokens allowed after the row's committed tokens and `first` of its drafts, and after each further
        draft.

        Returns [len(drafted) + 1 - first, words], one bit per token. After a draft that does not match, the mask of the
        place before it is repeated.
        """
        matcher = self._matchers[row]
        consumed = matcher.try_consume_tokens(list(drafted[:first]))
        matching = consumed == first
        assert self._tokenizer is not None
        words = np.zeros((len(drafted) + 1 - first, -(-self._tokenizer.vocab_size // 32)), dtype=np.int32)
        for i, at in enumerate(words):
            if i and matching:
                matching = matcher.try_consume_tokens([drafted[first + i - 1]]) == 1
                consumed += matching
            if i and not matching:
                at[:] = words[i - 1]
            elif matcher.is_error():
                self._only_eos(at)
            else:
                matcher.unsafe_compute_mask_ptr(at.ctypes.data, at.nbytes)
        if consumed:
            matcher.rollback(consumed)
        return words[:, : -(-self._vocab_size // 32)]

    def _only_eos(self, words: Words) -> None:
        """Reject a grammar that has become too complex; this ends its request."""
        for token in self._eos:
            words[token // 32] |= np.uint32(1 << token % 32).astype(np.int32)
