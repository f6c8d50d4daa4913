"""Grammars (llguidance): masks of the tokens that may follow in constrained output, the same on every rank.

A matcher's state is that after a row's committed tokens. For masks after drafts it, or a copy, advances over them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLTokenizer

from engine.batch.row_failures import RowError
from engine.batch.row_state import RowState
from engine.plan import RowStart
from engine.sampling.grammar_limits import LIMITS, MAX_FORCED_BYTES, describe_grammar_error
from models.files.json_values import ModelError
from models.files.tokenizer_source import read_tokenizer_source

Words = npt.NDArray[np.int32]

_WORK = "the grammar"
_TOKEN_MARK = b"\xff"
"""Before a token that a grammar demands as such."""


class GrammarError(RowError):
    """A grammar cannot be compiled, has become too complex, or does not match a row's tokens."""


@dataclass(slots=True)
class _Row:
    """A constrained row. rolls_back: whether the matcher can take tokens back. output: the row's tokens. error: why the
    grammar failed after a draft."""

    grammar: str
    matcher: LLMatcher
    rolls_back: bool
    output: list[int]
    error: str | None = None


class Grammars:
    """The grammars of all row slots of one rank.

    unavailable: why this model's output cannot be constrained; None if it can be.
    """

    def __init__(self, state: RowState, tokenizer: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """tokenizer: the model's tokenizer.json, with its other files beside it. It is read now, since not every kind
        can be matched."""
        self._failures = state.failures
        self._vocab_size = vocab_size
        self._rows: dict[int, _Row] = {}
        self.constrained = np.zeros(len(state.tokens), dtype=bool)
        """[max_rows]: rows that have a grammar."""
        self._tokenizer, self.unavailable = _read_tokenizer(tokenizer, vocab_size, eos_token_ids)

    def start(self, start: RowStart) -> None:
        """Start a request in a row slot."""
        row, grammar = start.row, start.params.grammar
        self._rows.pop(row, None)
        self.constrained[row] = grammar is not None
        if grammar is None:
            return
        with self._failures.guard(row, _WORK):
            matcher = self._compile(grammar)
            self._rows[row] = _Row(grammar, matcher, self._rolls_back(matcher), [])
        self.commit(row, start.tokens[start.num_prompt :])

    def commit(self, row: int, tokens: Sequence[int]) -> None:
        """Advance a row's matcher over its output; a row without a grammar keeps no state."""
        if (mine := self._rows.get(row)) is None:
            return
        with self._failures.guard(row, _WORK):
            mine.output += tokens
            mine.error = None
            _advance(mine.matcher, tokens)

    def masks(self, row: int, drafted: Sequence[int], first: int = 0) -> Words:
        """Compute the tokens allowed after the row's committed tokens and `first` of its drafts, and after each further
        draft.

        Returns [len(drafted) + 1 - first, words], one bit per token. After a draft that does not match, the mask of the
        place before it is repeated. If the grammar fails after the committed tokens, so does the row; if it fails after
        a draft, which may be wrong, no token is allowed from there on.
        """
        words = self._no_words(len(drafted) + 1 - first)
        with self._failures.guard(row, _WORK):
            mine = self._rows[row]
            matcher = mine.matcher if mine.rolls_back else mine.matcher.deep_copy()
            failed_at, mine.error = self._fill(words, matcher, drafted, first)
            if mine.error is not None:
                if first + failed_at == 0:
                    raise GrammarError(mine.error)
                if mine.rolls_back:
                    self._rebuild(mine)
        return words[:, : -(-self._vocab_size // 32)]

    def count_allowed(self, row: int, tokens: Sequence[int]) -> int:
        """Count the leading ones of `tokens` that may follow the row's committed tokens. A row without a grammar allows
        all."""
        if (mine := self._rows.get(row)) is None:
            return len(tokens)
        allowed = int(mine.matcher.validate_tokens(list(tokens)))
        if not mine.matcher.is_error():
            return allowed
        with self._failures.guard(row, _WORK):
            self._rebuild(mine)
        return 0

    def error(self, row: int) -> str | None:
        """Return why the row's grammar failed after a draft of this round, if it did."""
        return self._rows[row].error if row in self._rows else None

    def _rebuild(self, mine: _Row) -> None:
        """Replace a row's matcher, which never leaves an error."""
        mine.matcher = self._compile(mine.grammar)
        _advance(mine.matcher, mine.output)

    def _compile(self, grammar: str) -> LLMatcher:
        if self._tokenizer is None:
            raise GrammarError(self.unavailable)
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=LIMITS)
        _check(matcher)
        return matcher

    def _rolls_back(self, matcher: LLMatcher) -> bool:
        """Whether a matcher can take tokens back; not with lexemes of limited length, for example."""
        copy, (words,) = matcher.deep_copy(), self._no_words(1)
        copy.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        allowed = np.unpackbits(words.view(np.uint8), bitorder="little")
        copy.rollback(copy.try_consume_tokens([int(allowed.argmax())]))
        return not copy.is_error()

    def _fill(self, words: Words, matcher: LLMatcher, drafted: Sequence[int], first: int) -> tuple[int, str | None]:
        """Fill in the masks of Grammars.masks, and restore the matcher. If the grammar fails, returns where and why;
        the matcher is in any state then, and the masks from there on are empty."""
        consumed = matcher.try_consume_tokens(list(drafted[:first]))
        matching = consumed == first
        for i, at in enumerate(words):
            if i and matching:
                matching = matcher.try_consume_tokens([drafted[first + i - 1]]) == 1
                consumed += matching
            if matcher.is_error():
                return i, _error(matcher)
            if i and not matching:
                at[:] = words[i - 1]
                continue
            forced = matcher.compute_ff_bytes()
            if len(forced) > MAX_FORCED_BYTES:
                return i, f"it forces a text of more than {MAX_FORCED_BYTES} bytes"
            matcher.unsafe_compute_mask_ptr(at.ctypes.data, at.nbytes)
            if matcher.is_error():
                at.fill(0)
                return i, _error(matcher)
            if forced and (name := self._special_name(at, forced)):
                at.fill(0)
                return i, f"it forces the name of a special token, {name}"
        if consumed:
            matcher.rollback(consumed)
        return len(words), None

    def _special_name(self, allowed: Words, forced: bytes) -> str:
        """Return the name of the special token that alone is allowed where a text is forced; empty if there is none.
        The compiler cuts what is forced into tokens, and takes such a name for the token, which is no text."""
        (found,) = allowed.nonzero()
        bits = int(allowed[found[0]]) & 0xFFFFFFFF if len(found) == 1 else 0
        if self._tokenizer is None or bits.bit_count() != 1 or forced.startswith(_TOKEN_MARK):
            return ""
        token = int(found[0]) * 32 + bits.bit_length() - 1
        return self._tokenizer.decode_str([token]) if self._tokenizer.is_special_token(token) else ""

    def _no_words(self, count: int) -> Words:
        # A tokenizer may have more tokens than the model.
        size = self._vocab_size if self._tokenizer is None else self._tokenizer.vocab_size
        return np.zeros((count, -(-size // 32)), dtype=np.int32)


def _read_tokenizer(file: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> tuple[LLTokenizer | None, str | None]:
    """Read a tokenizer. Returns it, or None and the reason why its tokens cannot be matched."""
    if not file.is_file():
        return None, "the model's tokenizer.json was not found"
    if not eos_token_ids:
        return None, "the model has no end-of-sequence token, with which the output would end"
    try:
        source = read_tokenizer_source(file.parent).text
    except ModelError as error:
        return None, f"the model's tokenizer cannot be read: {error}"
    reason = ""
    for size in (vocab_size, None):  # None: the tokenizer's own, where it has more tokens than the model
        try:
            return LLTokenizer(source, n_vocab=size, eos_token=list(eos_token_ids)), None
        except Exception as error:  # the library raises several types
            reason = describe_grammar_error(str(error))
    return None, f"the model's tokenizer is of a kind that cannot be matched: {reason}"


def _advance(matcher: LLMatcher, tokens: Sequence[int]) -> None:
    """Advance over output. Tokens after the grammar's end, such as an end of sequence, do not advance the matcher."""
    consumed = matcher.try_consume_tokens(list(tokens))
    _check(matcher)
    if consumed < len(tokens) and not matcher.is_stopped():
        raise GrammarError("it does not match a token of the output")


def _check(matcher: LLMatcher) -> None:
    if matcher.is_error():
        raise GrammarError(_error(matcher))


def _error(matcher: LLMatcher) -> str:
    return describe_grammar_error(matcher.get_error())
