"""Index of what followed each context earlier in one request: in its prompt, and in its output so far."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from engine.ngram.context_array import MAX_MATCH, ContextArray

MIN_MATCH = 2
"""Smallest number of last tokens that a continuation must follow."""
MAX_PLACES = 16
"""Largest number of places of the output that vote, and of those on each side of the best match in a sorted text."""


class NgramIndex:
    """Index of a request's tokens, which only grow. The prompt is sorted once; output tokens are entered one by one.

    num_tokens: leading tokens that are indexed. idle: rounds since a proposal was not taken; 0 again
    once one is.
    """

    def __init__(self, prompt: Sequence[int]) -> None:
        self._prompt = ContextArray.build(prompt)
        self._after: dict[tuple[int, int], list[int]] = {}  # by pair of tokens, positions after it beyond the prompt
        self.num_tokens = len(prompt)
        self.idle = 0

    @property
    def num_bytes(self) -> int:
        """Estimated memory: that of the sorted prompt, and about 200 bytes for each further token."""
        return self._prompt.num_bytes + 200 * (self.num_tokens - len(self._prompt))

    def update(self, tokens: Sequence[int]) -> None:
        """Index what was appended to the tokens. tokens: all of the request."""
        for position in range(max(self.num_tokens, MIN_MATCH), len(tokens)):
            self._after.setdefault((tokens[position - 2], tokens[position - 1]), []).append(position)
        self.num_tokens = len(tokens)

    def matches(self, tokens: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Find earlier positions after the last tokens, most recent first in the output. tokens: all of the request,
        as indexed. Yields (position, number of tokens before it that are the last ones), see ContextArray.matches."""
        count = len(tokens)
        if count < MIN_MATCH:
            return
        context = tokens[-MAX_MATCH:]
        for position in reversed(self._after.get((context[-2], context[-1]), ())[-MAX_PLACES:]):
            # Of text that repeats itself, all of the context is the same.
            same = MAX_MATCH if tokens[max(0, position - MAX_MATCH) : position] == context else MIN_MATCH
            while same < min(MAX_MATCH, position) and tokens[position - 1 - same] == context[-1 - same]:
                same += 1
            yield position, same
        yield from self._prompt.matches(context, MIN_MATCH, MAX_PLACES)
