"""Whose prompt is computed first, and who is preempted."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.messages import AddRequest
from engine.params import SamplingParams
from engine.plan import RoundResult, RowResult
from engine.scheduler.controller import FixedGamma
from engine.scheduler.kv_manager import KVManager
from engine.scheduler.prefill import PrefillNeed, share_prefill
from engine.scheduler.scheduler import Scheduler
from tests.support.profiles import examples


def scheduler(
    *, pages: int = 1000, page_size: int = 4, max_rows: int = 8, batch: int = 16, prefix: bool = True
) -> Scheduler:
    return Scheduler(
        kv=KVManager(pages, page_size, prefix=prefix),
        page_size=page_size,
        max_rows=max_rows,
        max_batch_tokens=batch,
        max_waiting=100,
        max_model_len=2000,
        eos_token_ids=[0],
        controller=FixedGamma(0),
    )


def step(made: Scheduler) -> list[str]:
    """Run a round. Returns the ids of the requests that sampled."""
    plan, requests = made.schedule()
    results = [RowResult(0, 0, [5], None) for work in plan.work if work.samples]
    committed = made.commit(plan, requests, RoundResult(plan.number, results, 0.0, 0.0))
    made.check()
    return [request.id for request, *_ in committed]


def add(made: Scheduler, id: str, length: int, *, priority: int = 0, max_tokens: int = 50) -> None:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    made.add(AddRequest(id, [sum(id.encode())] * length, params, priority=priority))


# -- sharing a round's prefill tokens ----------------------------------------------------------------------------------


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    made = scheduler()
    add(made, "long", 500)
    step(made)
    add(made, "short", 7)
    assert step(made) == ["short"]  # in the very next round


def test_the_oldest_prompt_keeps_half_while_short_ones_keep_coming() -> None:
    made = scheduler(batch=16, max_rows=4)
    add(made, "long", 160)
    done: list[str] = []
    rounds = 0
    while "long" not in done:
        add(made, f"short {rounds}", 8, max_tokens=1)
        done += step(made)
        rounds += 1
    assert rounds == 20  # of 8 tokens each
    assert len(done) == 21  # and a short one in each round


def test_prompts_of_equal_length_are_computed_one_after_another() -> None:
    made = scheduler(batch=16)
    for i in range(3):
        add(made, str(i), 32)
    assert [step(made) for _ in range(3)] == [[], ["0"], ["0"]]


def test_a_waiting_prompt_is_not_overtaken_for_ever() -> None:
    """The oldest prompt that is not computed is sure of its half before it has a row."""
    made = scheduler(batch=16)
    add(made, "first", 64)
    step(made)
    add(made, "second", 64)
    done: list[str] = []
    for i in range(30):
        add(made, f"short {i}", 8, max_tokens=1)
        done += step(made)
        if "second" in done:
            break
    assert i < 2 * (64 + 64) / 16


def test_no_prompt_waits_more_than_twice_as_long_as_in_order() -> None:
    """Many short old prompts, behind which shorter ones keep coming."""
    made = scheduler(batch=256, max_rows=64, pages=5000)
    for i in range(50):
        add(made, f"old {i}", 200, max_tokens=1)
    rounds, left = 0, 50
    while left:
        for i in range(10):
            add(made, f"new {rounds} {i}", 190, max_tokens=1)
        left -= sum(id.startswith("old") for id in step(made))
        rounds += 1
        if made.waiting and len(made.waiting) > 80:
            for request in made.waiting[60:]:
                made.abort(request.id)
    assert rounds <= 2 * 50 * 200 / 256 + 1


@given(
    needs=st.lists(st.tuples(st.integers(-2, 2), st.integers(1, 300), st.integers(1, 300)), max_size=12),
    tokens=st.integers(1, 200),
)
def test_shares(needs: list[tuple[int, int, int]], tokens: int) -> None:
    given = sorted(PrefillNeed(p, r, min(r, limit)) for p, r, limit in needs)
    random.Random(tokens).shuffle(given)
    given.sort(key=lambda need: need.priority)
    shares = share_prefill(given, tokens)
    assert all(0 <= share <= need.limit for share, need in zip(shares, given, strict=True))
    assert sum(shares) == min(tokens, sum(need.limit for need in given))  # none is left over
    in_order = (tokens + 1) // 2
    for i, one in enumerate(given):
        sure = min(one.limit, in_order)  # what it gets of the half that is handed out in order
        in_order -= sure
        assert shares[i] >= sure
        for j, other in enumerate(given):  # nobody gets more than that before the shorter ones have all they can take
            if (other.priority, other.remaining) < (one.priority, one.remaining) and shares[i] > sure:
                assert shares[j] == other.limit


# -- preemption --------------------------------------------------------------------------------------------------------


def test_the_least_urgent_request_is_preempted() -> None:
    """The most urgent request is admitted last and stays; of equals, the one that came last is preempted."""
    made = scheduler(pages=12, page_size=4, max_rows=4, batch=64)
    add(made, "a", 7, priority=100, max_tokens=17)
    add(made, "b", 7, priority=100, max_tokens=17)
    step(made)
    add(made, "urgent", 7, priority=-100, max_tokens=17)
    waited: set[str] = set()
    while made.has_work:
        step(made)
        waited |= {request.id for request in made.waiting}
    assert made.preemptions
    assert waited == {"b"}


@given(seed=st.integers(0, 2**32))
@examples(40, 400)
def test_the_most_urgent_request_is_never_preempted(seed: int) -> None:
    rng = random.Random(seed)
    made = scheduler(pages=rng.randint(8, 20), page_size=4, max_rows=5, batch=32)
    for i in range(12):
        add(made, str(i), rng.randint(1, 12), priority=rng.choice([-1, 0, 3]), max_tokens=rng.randint(1, 19))
        for _ in range(rng.randint(0, 3)):
            before = min(made.running, key=lambda request: (request.priority, request.number), default=None)
            step(made)
            assert before is None or before.row is not None or before.finish_reason is not None
    while made.has_work:
        step(made)


@pytest.mark.parametrize("prefix", [False, True])
def test_who_waits_for_pages_keeps_its_place(prefix: bool) -> None:
    """W has the prompt of L, which is being computed, so it waits for its pages. Shorter requests that arrive after it
    must not take the rows that are left."""
    made = scheduler(max_rows=3, batch=16, prefix=prefix)
    document = [*range(10, 410)]
    made.add(AddRequest("L", [*document, 1], SamplingParams(max_tokens=500, ignore_eos=True)))
    step(made)
    made.add(AddRequest("W", [*document, 2], SamplingParams(max_tokens=500, ignore_eos=True)))
    for i in range(3):
        add(made, f"short {i}", 4, max_tokens=500)
    sampled: list[str] = []
    while "W" not in sampled:
        sampled += step(made)
        assert len(sampled) < 200, "W waits for the end of others"
    assert made.waiting
