"""Trees of drafts from the text: several continuations of a node, where a chain has one (SpecInfer, arXiv 2305.09781;
SSSD, arXiv 2411.05894). For measurements; the engine drafts chains (engine.ngram.ngram_drafts)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from heapq import heappop, heappush
from itertools import count
from typing import NamedTuple

from engine.config.speculation import SpeculationConfig
from engine.control.acceptance import AcceptanceRecord
from engine.control.text_acceptance import CLASS_STARTS
from engine.ngram.context_array import MAX_MATCH
from engine.ngram.ngram_drafts import weigh
from engine.ngram.ngram_index import MAX_PLACES, MIN_MATCH, NgramIndex
from engine.ngram.text_store import TextStore

LIMIT = SpeculationConfig().ngram_gamma_max
"""Largest depth of a tree: the engine's limit of drafts."""
_PRIORS, _TRIALS, _MEMORY = (0.8, 0.1, 0.05), 5.0, 300.0
"""Odds of the first, the second and each further vote before any was judged; their weight in judged votes; number of
judged votes that are remembered."""

Kind = tuple[bool, bool, int, int]


class Node(NamedTuple):
    """Draft of a tree. parent: index of the node before it; -1: the pending token. probability: that it is accepted."""

    token: int
    parent: int
    probability: float


class _Place(NamedTuple):
    """Earlier place of the text, or one of the store. weight: of its vote. match: tokens before it that are the last
    ones of the text."""

    weight: float
    match: int
    position: int
    is_stored: bool


class _Vote(NamedTuple):
    """Continuation that places vote for. kind: see VoteOdds."""

    token: int
    kind: Kind
    places: list[_Place]


class VoteOdds:
    """Learnt odds that a vote is the target's token, given that those before it were.

    They depend on the vote's kind: whether it is for a first draft; whether places disagree; the class of the longest
    match; and its rank among the votes for one place.
    """

    def __init__(self) -> None:
        self._records: dict[Kind, AcceptanceRecord] = {}

    def __getitem__(self, kind: Kind) -> float:
        prior = _PRIORS[min(kind[-1], len(_PRIORS) - 1)]
        record = self._records.get(kind)
        return prior if record is None else record.alpha(prior, _TRIALS)

    def judge(self, votes: Sequence[_Vote], token: int) -> None:
        """Learn which of the votes for one place was right. token: that followed there."""
        for vote in votes:
            right = int(vote.token == token)
            self._records.setdefault(vote.kind, AcceptanceRecord()).add(right, 1 - right, _MEMORY)


class Continuations:
    """Continuations of a text that its earlier places, and a store, offer."""

    def __init__(self, index: NgramIndex, tokens: Sequence[int], store: TextStore | None = None) -> None:
        """tokens: of the whole text so far. index: of it, is brought up to date."""
        index.update(tokens)
        self._tokens, self._store = tokens, store
        found = [index.matches(tokens)]
        if store is not None:
            found.append(store.matches(tokens[-MAX_MATCH:], MIN_MATCH, MAX_PLACES))
        self.places = [_Place(*place, is_stored=places is not found[0]) for places in found for place in weigh(places)]

    def votes(self, places: Sequence[_Place], path: Sequence[int]) -> list[_Vote]:
        """Return what these places, which agree with the drafts `path`, vote for next: the most votes first."""
        by_token: dict[int, list[_Place]] = {}
        for place in places:
            if (token := self._read(place, path)) is not None:
                by_token.setdefault(token, []).append(place)
        order = sorted(by_token, key=lambda token: sum(place.weight for place in by_token[token]), reverse=True)
        longest = bisect_right(CLASS_STARTS, max((place.match for place in places), default=0) + len(path))
        return [
            _Vote(token, (not path, len(order) > 1, longest, rank), by_token[token]) for rank, token in enumerate(order)
        ]

    def _read(self, place: _Place, path: Sequence[int]) -> int | None:
        """Return the token after a place and `path`; None: its text ends. The end of the request's text goes on into
        the path, as repetitions do."""
        at, known = place.position + len(path), len(self._tokens)
        if place.is_stored:
            return next(iter(self._store.following(at, 1)), None) if self._store is not None else None
        return self._tokens[at] if at < known else path[at - known]

    def tree(self, odds: VoteOdds, width: int, limit: int) -> list[Node]:
        """Grow a tree of up to `limit` nodes, always by the most probable one; so its first n nodes are the best tree
        of n nodes. width: largest number of children; 1: a chain. Parents precede their children."""
        nodes: list[Node] = []
        heap: list[tuple[float, int, int, _Vote, list[int]]] = []
        numbers = count()

        def offer(parent: int, probability: float, places: Sequence[_Place], path: list[int]) -> None:
            for vote in self.votes(places, path)[:width]:
                heappush(heap, (-probability * odds[vote.kind], next(numbers), parent, vote, path))

        offer(-1, 1.0, self.places, [])
        while heap and len(nodes) < limit:
            negative, _, parent, vote, path = heappop(heap)
            nodes.append(Node(vote.token, parent, -negative))
            if len(path) + 1 < LIMIT:
                offer(len(nodes) - 1, -negative, vote.places, [*path, vote.token])
        return nodes

    def judge(self, odds: VoteOdds, following: Sequence[int]) -> int:
        """Judge the votes along the tokens that follow. Returns how many of these, up to LIMIT, the votes have: the
        accepted ones of a tree of all continuations."""
        places: Sequence[_Place] = self.places
        for step, token in enumerate(following[:LIMIT]):
            votes = self.votes(places, following[:step])
            odds.judge(votes, token)
            places = next((vote.places for vote in votes if vote.token == token), [])
            if not places:
                return step
        return min(LIMIT, len(following))


def count_accepted(nodes: Sequence[Node], following: Sequence[int]) -> int:
    """Count the nodes that a descent accepts: at each one, it takes the child that is the token that follows."""
    children = {(node.parent, node.token): number for number, node in enumerate(nodes)}
    at = -1
    for step, token in enumerate(following):
        if (at := children.get((at, token), -2)) == -2:
            return step
    return len(following)
