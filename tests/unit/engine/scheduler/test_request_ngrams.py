"""Search of requests' text: when it begins, when it pauses, and what bounds it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.messages import AddRequest
from engine.ngram.ngram_drafts import NO_PROPOSAL, NgramDrafts
from engine.params import SamplingParams
from engine.scheduler.request import Request
from engine.scheduler.request_ngrams import _INDEXED_TOKENS, _PATIENCE, RequestNgrams


def request_of(tokens: Sequence[int], **params: Any) -> Request:
    return Request(AddRequest("a", list(tokens), SamplingParams(**{"max_tokens": 100, **params})), (), 0)


def searcher(gamma_max: int = 6, allowed: int = 99) -> RequestNgrams:
    return RequestNgrams(NgramDrafts(1000), gamma_max, lambda row, tokens: min(allowed, len(tokens)))


def test_proposals_have_the_length_that_is_allowed() -> None:
    text = [1, 2, 3, 4] * 5
    for request, limit, count in (
        (request_of(text), 99, 6),
        (request_of(text), 4, 4),
        (request_of(text), 0, 0),
        (request_of(text, max_tokens=3), 99, 2),
        (request_of(text, max_draft_tokens=1), 99, 1),
        (request_of(text, max_draft_tokens=0), 99, 0),
    ):
        (proposal,) = searcher().propose([request], limit)
        assert proposal.tokens == [1, 2, 3, 4, 1, 2][:count]


def test_a_grammar_cuts_proposals() -> None:
    request = request_of([1, 2, 3, 4] * 5, grammar="start: /a/")
    request.row = 0
    (proposal,) = searcher(allowed=2).propose([request], 9)
    assert proposal.tokens == [1, 2]


def test_text_whose_drafts_are_not_taken_is_searched_less() -> None:
    found, request = searcher(), request_of([1, 2, 3, 4] * 5)
    searched = []
    for _ in range(5 * _PATIENCE):
        (proposal,) = found.propose([request], 6)
        searched.append(bool(proposal.tokens))
        found.record(request, proposal, taken=False)
    assert searched[:_PATIENCE] == [True] * _PATIENCE
    assert searched[_PATIENCE:].count(True) == 4
    while not found.propose([request], 6)[0].tokens:
        found.record(request, NO_PROPOSAL, taken=False)
    found.record(request, found.propose([request], 6)[0], taken=True)
    assert all(found.propose([request], 6)[0].tokens for _ in range(3))


def test_text_without_matches_is_searched_each_time() -> None:
    """Looking for what is not there costs little, and it may be there next time."""
    found, request = searcher(), request_of(range(50))
    for _ in range(3 * _PATIENCE):
        (proposal,) = found.propose([request], 6)
        assert proposal == NO_PROPOSAL
        found.record(request, proposal, taken=False)
    request.tokens += [0, 1]
    assert found.propose([request], 2)[0].tokens == [2, 3]


def test_prompts_are_indexed_beside_rounds_a_few_at_a_time() -> None:
    found = searcher()
    requests = [request_of(range(_INDEXED_TOKENS // 3)) for _ in range(9)] + [request_of([1], max_tokens=0)]
    for expected in (4, 8, 9, 9):
        found.prepare(requests)
        assert sum(request.ngrams is not None for request in requests) == expected
    assert requests[-1].ngrams is None  # it generates nothing


def test_a_round_indexes_few_tokens() -> None:
    """Many prompts that begin to decode together, as choices of one request do, are indexed in several rounds."""
    found, requests = searcher(), [request_of([1, 2, 3, 4] * (_INDEXED_TOKENS // 8)) for _ in range(5)]
    for count in (2, 4, 5, 5):
        proposals = found.propose(requests, 6)
        assert [bool(proposal.tokens) for proposal in proposals] == [True] * count + [False] * (5 - count)
    long = request_of([1, 2, 3, 4] * _INDEXED_TOKENS)
    assert found.propose([long, request_of([1, 2] * 9)], 6)[0].tokens
