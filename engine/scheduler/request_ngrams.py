"""Drafts from text, for the rows of a round."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from engine.ngram.ngram_drafts import NO_PROPOSAL, NgramDrafts, Proposal
from engine.ngram.ngram_index import NgramIndex
from engine.scheduler.request import Request

_PATIENCE = 8
"""Number of rounds without a draft taken from a request's text, after which it is searched only once in as many."""
_INDEXED_TOKENS = 16_384
"""Number of tokens after which no further prompt is indexed beside, or before, a round. One prompt is indexed whole."""

CountAllowed = Callable[[int, Sequence[int]], int]
"""From a row slot and tokens, the number of leading ones that the row's grammar allows next."""


class RequestNgrams:
    """Finds drafts in the text of requests. A request's index is made when it decodes, or before that, while a device
    is busy (`prepare`)."""

    def __init__(self, drafts: NgramDrafts, gamma_max: int, count_allowed: CountAllowed) -> None:
        """gamma_max: largest number of drafts of a row."""
        self._drafts = drafts
        self._gamma_max = gamma_max
        self._count_allowed = count_allowed

    def prepare(self, requests: Iterable[Request]) -> None:
        """Index the prompts of requests that have no index yet, up to a number of tokens."""
        self._index(request for request in requests if self._limit(request) > 0)

    def propose(self, requests: Sequence[Request], limit: int) -> list[Proposal]:
        """Propose up to `limit` tokens after the committed ones of each request, which decode; none to requests whose
        prompts are not indexed yet: a round indexes a limited number of tokens."""
        limits = [min(limit, self._limit(request)) for request in requests]
        self._index(request for request, most in zip(requests, limits, strict=True) if most > 0)
        return [self._propose(request, most) for request, most in zip(requests, limits, strict=True)]

    def _index(self, requests: Iterable[Request]) -> None:
        left = _INDEXED_TOKENS
        for request in requests:
            if left > 0 and request.ngrams is None:
                request.ngrams = NgramIndex(request.tokens)
                left -= request.num_tokens

    def record(self, request: Request, proposal: Proposal, taken: bool) -> None:
        """Learn whether a request's proposal was taken."""
        if request.ngrams is not None and (proposal.tokens or request.ngrams.idle):
            request.ngrams.idle = 0 if taken else request.ngrams.idle + 1

    def _propose(self, request: Request, limit: int) -> Proposal:
        if limit < 1 or request.ngrams is None:
            return NO_PROPOSAL
        if (idle := request.ngrams.idle) >= _PATIENCE and idle % _PATIENCE:
            return NO_PROPOSAL
        proposal = self._drafts.propose(request.ngrams, request.tokens, limit)
        if request.params.grammar is not None and proposal.tokens:
            assert request.row is not None
            proposal = proposal.first(self._count_allowed(request.row, proposal.tokens))
        return proposal

    def _limit(self, request: Request) -> int:
        return min(self._gamma_max, request.max_draft_tokens)
