"""What the prefix index hands out, to whom, and for how long."""

from __future__ import annotations

from typing import Any

import pytest

from engine.messages import AddRequest
from engine.params import SamplingParams
from engine.scheduler.kv_manager import KVManager
from engine.scheduler.pages import PageLeak
from engine.scheduler.prefill import find_waits
from engine.scheduler.request import Request

PAGE = 4


def request(tokens: list[int], *, id: str = "r", salt: str = "", number: int = 0, **params: Any) -> Request:
    return Request(AddRequest(id, tokens, SamplingParams(**params), cache_salt=salt), [], number)


def admit(kv: KVManager, made: Request) -> Request:
    kv.admit(made)
    made.row = made.number
    return made


def compute(kv: KVManager, made: Request, tokens: int | None = None) -> list[tuple[int, int]]:
    """Compute tokens of an admitted request, all of them by default."""
    made.num_computed = made.num_tokens if tokens is None else tokens
    return kv.commit(made).pages


def finish(kv: KVManager, tokens: list[int], **others: Any) -> None:
    """Admit, compute and end a request."""
    made = admit(kv, request(tokens, **others))
    compute(kv, made)
    kv.release(made)


def test_full_pages_of_computed_tokens_are_found_by_whoever_begins_with_them() -> None:
    kv = KVManager(20, PAGE)
    first = admit(kv, request([*range(10)]))
    assert not kv.match(request([*range(10)]))
    compute(kv, first, 7)
    assert [found.page for found in kv.match(request([*range(10)]))] == first.pages[:1], (
        "a page that is not full is not handed out"
    )
    compute(kv, first, 10)
    second = admit(kv, request([*range(9), 50, 51, 52, 53]))
    assert second.pages[:2] == first.pages[:2]
    assert second.num_computed == second.cached_tokens == 8
    assert not kv.match(request([1, *range(9)]))
    kv.check([first, second])


@pytest.mark.parametrize(("length", "uncached", "found"), [(8, 1, 1), (9, 1, 2), (8, 3, 1), (11, 3, 2), (10, 3, 1)])
def test_the_last_tokens_are_computed_by_the_request_itself(length: int, uncached: int, found: int) -> None:
    kv = KVManager(20, PAGE, num_uncached_tokens=uncached)
    finish(kv, [*range(12)])
    assert len(kv.match(request([*range(length)]))) == found


def test_ended_requests_stay_cached_until_pages_are_needed_children_first() -> None:
    kv = KVManager(6, PAGE)
    finish(kv, [*range(12)])
    finish(kv, [*range(8), 50, 51, 52, 53])
    assert (kv.free, kv.cached, kv.available) == (2, 4, 6)
    big = admit(kv, request([*range(100, 116)]))
    assert kv.evictions == 2
    assert len(kv.match(request([*range(12), 0]))) == 2, "the beginning of both is still there"
    kv.check([big])


def test_equal_pages_computed_twice_become_one() -> None:
    kv = KVManager(20, PAGE)
    first, second = (admit(kv, request([*range(10)], id=str(i))) for i in range(2))
    assert compute(kv, first) == []
    own = second.pages[:2]
    assert compute(kv, second) == [(0, first.pages[0]), (1, first.pages[1])]
    assert second.pages[:2] == first.pages[:2]
    assert kv.free == 20 - 4
    assert set(own).isdisjoint(first.pages + second.pages)
    kv.check([first, second])


def test_salts_keep_tenants_apart() -> None:
    kv = KVManager(20, PAGE)
    finish(kv, [*range(12)], salt="a")
    for salt, found in (("a", 2), ("b", 0), ("", 0)):
        assert len(kv.match(request([*range(12)], salt=salt))) == found


def test_prompt_logprobs_need_all_tokens() -> None:
    kv = KVManager(20, PAGE)
    finish(kv, [*range(12)])
    made = admit(kv, request([*range(12)], prompt_logprobs=0))
    assert made.num_computed == 0
    assert kv.queries == 12, "it was not looked up"
    compute(kv, made)
    kv.check([made])


def test_a_reset_forgets_what_anyone_has_computed() -> None:
    kv = KVManager(20, PAGE)
    finish(kv, [*range(50, 60)])
    running = admit(kv, request([*range(10)]))
    compute(kv, running, 8)
    waiting = request([*range(10)])
    assert kv.match(waiting)
    kv.reset([running, waiting])
    assert kv.cached == 0
    assert not kv.match(waiting)
    compute(kv, running)
    assert not kv.match(waiting), "pages of before the reset do not enter the index"
    kv.check([running])
    kv.release(running)
    assert kv.free == 20
    finish(kv, [*range(10)])
    assert kv.match(waiting)


def test_without_an_index_pages_are_free_at_once() -> None:
    kv = KVManager(20, PAGE, prefix=False)
    finish(kv, [*range(12)])
    assert (kv.free, kv.cached, kv.queries) == (20, 0, 0)
    assert not kv.match(request([*range(12)]))


def decode(kv: KVManager, made: Request) -> Request:
    """Compute all tokens of an admitted request, which then has a pending one."""
    made.num_computed = made.num_tokens
    made.tokens.append(7)
    kv.commit(made)
    return made


def test_shared_stretches_are_counted_once_per_decoding_row_beyond_the_first() -> None:
    kv = KVManager(60, PAGE, shared_stretch=2 * PAGE)
    rows = [decode(kv, admit(kv, request([*range(21)], id="0")))]
    waiting = admit(kv, request([*range(21)], id="prefills"))
    assert kv.shared_tokens == 0, "only decoding rows read"
    for i, length in enumerate((21, 13, 7), 1):
        rows.append(decode(kv, admit(kv, request([*range(length)], id=str(i)))))
    assert kv.shared_tokens == 16 + 8 + 0  # pages 0-3 | 0-1, and half of a stretch | half of one
    kv.check([*rows, waiting])
    for row in rows[:2]:
        row.tokens += [8] * 15
        kv.allocate(row, 37)
        row.num_computed = 36
        kv.commit(row)
    assert kv.shared_tokens == 32 + 8, "both have generated the same pages"
    kv.check([*rows, waiting])
    for row in rows:
        kv.release(row)
    assert kv.shared_tokens == 0


def test_draft_pages_are_found_only_where_the_draft_model_has_computed_them() -> None:
    kv = KVManager(20, PAGE, draft_pages=True)
    first = admit(kv, request([*range(17)]))
    first.draft_lag = 17 - 8
    compute(kv, first)
    second = admit(kv, request([*range(17)]))
    assert (second.num_computed, second.draft_lag) == (16, 8)
    third = admit(kv, request([*range(17)], prompt_logprobs=0))
    third.draft_lag = 0
    assert [page for _, page in compute(kv, third)] == first.pages[:4]
    assert third.draft_lag == 17 - 8, "the other two pages have no draft KV"
    kv.check([first, second, third])
    second.draft_lag = 1
    compute(kv, second, 16)
    assert admit(kv, request([*range(17)])).draft_lag == 4, "the last page lacks a token"


def test_an_index_that_names_a_wrong_page_is_a_fault() -> None:
    kv = KVManager(20, PAGE)
    made = admit(kv, request([*range(12)]))
    compute(kv, made)
    made.pages[0], made.pages[1] = made.pages[1], made.pages[0]
    with pytest.raises(PageLeak, match="what the index names"):
        kv.check([made])


def test_nobody_finds_the_kv_of_a_request_that_has_failed() -> None:
    kv = KVManager(40, PAGE)
    finish(kv, [*range(8), *range(50, 58)])
    other = admit(kv, request([*range(6)], id="other"))
    decode(kv, other)
    failed, beside = (admit(kv, request([*range(16), i], id=str(i))) for i in range(2))
    compute(kv, failed, 12)
    compute(kv, beside, 12)
    finish(kv, [*range(12), *range(70, 79)])
    kv.distrust(failed, [other, failed, beside])
    kv.check([other, failed, beside])
    kv.release(failed)
    assert len(kv.match(request([*range(16)]))) == 1, "another request decodes with the first page"
    compute(kv, beside)
    assert len(kv.match(request([*range(16)]))) == 1, "one that has the other pages too computes for itself"
    kv.distrust(other, [other, beside])
    for each in (other, beside):
        kv.release(each)
    kv.check([])
    assert (kv.free, kv.cached) == (40, 0), "all others begin with that page"


def waits(kv: KVManager, shares: list[int], *requests: Request) -> list[str]:
    for each in requests:
        if each.row is None:
            kv.match(each)
    return [each.id for each in find_waits(requests, shares, PAGE)]


def test_nobody_waits_for_output_where_the_index_has_prompts_alone() -> None:
    """A request that computes its output again, after it was preempted, hands out no page of it."""
    for prompts_only in (False, True):
        kv = KVManager(40, PAGE, prompts_only=prompts_only)
        preempted = request([*range(8)], id="preempted")
        preempted.tokens += range(8, 30)
        admit(kv, preempted)
        compute(kv, preempted, 9)
        assert waits(kv, [12, 12], preempted, request([*range(40)], id="later")) == ["later"] * (not prompts_only)


def test_who_waits_for_pages_that_another_prefill_computes() -> None:
    kv = KVManager(100, PAGE)
    a, b = request([*range(40)], id="a"), request([*range(20), *range(60, 80)], id="b")
    assert waits(kv, [16, 16], a, b) == ["b"]
    assert waits(kv, [16, 40], a, b) == ["a"], "b gets further"
    assert waits(kv, [0, 2], a, b) == ["a"], "a does not get on in this round"
    assert waits(kv, [0, 10, 6], request([*range(60)], id="x"), a, b) == ["x", "b"]
    assert waits(kv, [16, 16], a, request([9, *range(39)], id="c")) == []
    assert waits(kv, [16, 16], a, request([*range(40)], id="d", salt="s")) == []
    running = admit(kv, request([*range(40)], id="e"))
    compute(kv, running, 18)
    assert waits(kv, [16, 30, 30], b, running, a) == ["b", "a"], "who runs computes for those who wait"
    assert waits(kv, [3, 16], running, b) == ["b"], "by then all of their common tokens are computed"
    assert waits(kv, [3, 16], running, a) == [], "a would be through earlier by itself"
    scored = request([*range(40)], id="scored", prompt_logprobs=0)
    assert waits(kv, [30, 3], running, scored) == [], "it takes over nothing"
