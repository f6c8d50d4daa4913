"""Proposals of what may follow a request's tokens: the continuations of the places that match its end best, in its own
text and in a text store (SSSD, arXiv 2411.05894)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from engine.ngram.context_array import MAX_MATCH
from engine.ngram.ngram_index import MAX_PLACES, MIN_MATCH, NgramIndex
from engine.ngram.text_store import TextStore

_LONGER = 4.0
"""Weight of a place relative to one that matches one token less: more than four of those outvote it."""
_OLDER = 0.95
"""Weight of a place relative to the one before it in its list: the newer one in the output, and in a sorted text the
one whose context is nearer to the request's."""

_Read = Callable[[int], int | None]


@dataclass(frozen=True, slots=True)
class Proposal:
    """Tokens that may follow. match: tokens before them that the place they come from has in common with the text."""

    tokens: list[int] = field(default_factory=list)
    match: int = 0

    def first(self, count: int) -> Proposal:
        """Return the first `count` tokens."""
        return self if count >= len(self.tokens) else Proposal(self.tokens[:count], self.match)


NO_PROPOSAL = Proposal()


def weigh(matches: Iterable[tuple[int, int]]) -> Iterator[tuple[float, int, int]]:
    """Weigh the votes of places. matches: (position, tokens that are the same), as indices list them. Yields (weight,
    tokens that are the same, position)."""
    for rank, (position, same) in enumerate(matches):
        yield _LONGER**same * _OLDER**rank, same, position


class NgramDrafts:
    """Proposer for all requests of one engine."""

    def __init__(self, vocab_size: int, store: TextStore | None = None) -> None:
        """vocab_size: of the model. A tokenizer, and so a store, may have tokens that the model does not have."""
        self._vocab_size = vocab_size
        self._store = store

    def propose(self, index: NgramIndex, tokens: Sequence[int], limit: int) -> Proposal:
        """Propose up to `limit` tokens after `tokens`, all of the request. `index` is brought up to date.

        At each step the places that have agreed so far vote for their next token. A place at the end of the text goes
        on into what was proposed, as repetitions do.
        """
        index.update(tokens)
        if limit < 1 or len(tokens) < MIN_MATCH:
            return NO_PROPOSAL
        count = len(tokens)
        proposed: list[int] = []

        def own(position: int) -> int | None:
            return tokens[position] if position < count else proposed[position - count]

        live: list[tuple[float, int, int, _Read]] = [(*place, own) for place in weigh(index.matches(tokens))]
        if self._store is not None:
            stored = self._store.matches(tokens[-MAX_MATCH:], MIN_MATCH, MAX_PLACES)
            live += [(*place, self._store.token) for place in weigh(stored)]
        match = 0
        for step in range(limit):
            votes: dict[int, float] = {}
            said: list[int | None] = []
            for weight, _, position, read in live:
                token = read(position + step)
                said.append(token)
                if token is not None and token < self._vocab_size:
                    votes[token] = votes.get(token, 0.0) + weight
            if not votes:
                break
            best = max(votes, key=votes.__getitem__)
            proposed.append(best)
            live = [place for place, token in zip(live, said, strict=True) if token == best]
            if not step:
                match = max(same for _, same, _, _ in live)
        return Proposal(proposed, match)
