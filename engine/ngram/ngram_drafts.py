"""Proposals of what may follow a request's tokens: the continuations of the places that match its end best, in its own
text and in a text store (SSSD, arXiv 2411.05894)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from engine.ngram.context_array import MAX_MATCH
from engine.ngram.ngram_index import MAX_PLACES, MIN_MATCH, NgramIndex
from engine.ngram.text_store import TextStore

_LONGER = 4.0
"""Weight of a place relative to one that matches one token less: more than four of those outvote it."""
_OLDER = 0.95
"""Weight of a place relative to the one before it in its list: the newer one in the output, and in a sorted text the
one whose context is nearer to the request's."""

_Continuation = tuple[int, ...]


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

        At each step the places that have agreed so far vote for their next token, all places with the same
        continuation as one.
        """
        index.update(tokens)
        if limit < 1 or len(tokens) < MIN_MATCH:
            return NO_PROPOSAL
        # A place that goes on votes for its own tokens alone, so continuations are known beforehand.
        weights: dict[_Continuation, float] = {}
        matches: dict[_Continuation, int] = {}
        for weight, same, following in self._continuations(index, tokens, limit):
            weights[following] = weights.get(following, 0.0) + weight
            matches[following] = max(matches.get(following, 0), same)
        live = list(weights)
        proposed: list[int] = []
        match = 0
        while live and len(proposed) < limit:
            step = len(proposed)
            votes: dict[int, float] = {}
            for following in live:
                votes[following[step]] = votes.get(following[step], 0.0) + weights[following]
            best = max(votes, key=votes.__getitem__)
            live = [following for following in live if following[step] == best]
            match = match or max(matches[following] for following in live)
            proposed += live[0][step:] if len(live) == 1 else (best,)
            live = [following for following in live if len(following) > len(proposed)]
        return Proposal(proposed, match)

    def _continuations(
        self, index: NgramIndex, tokens: Sequence[int], limit: int
    ) -> Iterator[tuple[float, int, _Continuation]]:
        """List the places' weights, numbers of matching tokens, and the tokens after them, from 1 to `limit`. A place
        near the end of the text goes on as if that were repeated."""
        for weight, same, position in weigh(index.matches(tokens)):
            own = tuple(tokens[position : position + limit])
            yield weight, same, (own * -(-limit // len(own)))[:limit]
        if self._store is None:
            return
        stored = self._store.matches(tokens[-MAX_MATCH:], MIN_MATCH, MAX_PLACES)
        for weight, same, position in weigh(stored):
            following = self._store.following(position, limit)
            unknown = (at for at, token in enumerate(following) if token >= self._vocab_size)
            if known := following[: next(unknown, limit)]:
                yield weight, same, known
