"""Draft KV in pages that the prefix index names: it is neither lost nor taken for granted."""

from __future__ import annotations

from engine.messages import AddRequest
from engine.params import SamplingParams
from engine.scheduler.kv_manager import KVManager
from engine.scheduler.request import Request


def request(number: int, tokens: list[int]) -> Request:
    return Request(AddRequest(str(number), tokens, SamplingParams()), [], number)


def test_who_adopts_a_page_without_draft_kv_lacks_its_tokens() -> None:
    """Both requests have computed the same two pages. The draft model has computed 5 tokens of the first request, and 7
    of the second, which adopts the second page too: what is found later must not depend on who drafts."""
    kv = KVManager(20, 4, draft_pages=True)
    first, second = (request(i, [5] * 8) for i in range(2))
    for made, lag in ((first, 3), (second, 1)):
        kv.admit(made)
        made.num_computed, made.draft_lag = 8, lag
    kv.commit(first)
    kv.commit(second)
    assert second.pages == first.pages
    assert (first.draft_lag, second.draft_lag) == (3, 4)
    kv.check([first, second])


def test_a_page_is_not_taken_for_drafted_because_it_was_before_a_reset() -> None:
    """A request drafts after a reset, and ends. Another one computes other tokens in its page, but not their draft
    KV."""
    kv = KVManager(4, 4, draft_pages=True)
    made = request(0, [5] * 5)
    kv.admit(made)
    made.num_computed = made.draft_lag = 4
    kv.commit(made)
    kv.reset([made])
    page, made.draft_lag = made.pages[0], 0
    kv.commit(made)
    kv.release(made)
    other = request(1, [6] * 5)
    kv.admit(other)
    assert other.pages[0] == page
    other.num_computed = other.draft_lag = 4
    kv.commit(other)
    later = request(2, [6] * 5)
    kv.admit(later)
    assert (later.num_computed, later.draft_lag) == (4, 4)
