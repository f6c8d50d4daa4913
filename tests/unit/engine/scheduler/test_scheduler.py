"""The scheduler against random results: plans obey every limit, and counters and pages are conserved."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.messages import AddRequest
from engine.params import SamplingParams
from engine.plan import RoundPlan, RoundResult, RowFailure, RowResult, RowWork
from engine.scheduler.controller import FixedGamma
from engine.scheduler.kv_manager import KVManager
from engine.scheduler.request import Request
from engine.scheduler.scheduler import Scheduler
from engine.scheduler.validation import QueueFull, RequestError
from kernels.kv.kv_bits import KV_BITS
from tests.support.profiles import examples

EOS = 0


def scheduler(
    *,
    pages: int = 64,
    page_size: int = 4,
    max_rows: int = 4,
    batch: int = 40,
    gamma: int = 3,
    max_len: int = 120,
    max_waiting: int = 20,
    draft_kv: bool = False,
    kv_format: str = "dense",
) -> tuple[Scheduler, KVManager]:
    kv = KVManager(pages, page_size)
    made = Scheduler(
        kv=kv,
        page_size=page_size,
        max_rows=max_rows,
        max_batch_tokens=batch,
        max_waiting=max_waiting,
        max_model_len=max_len,
        eos_token_ids=[EOS],
        controller=FixedGamma(gamma),
        draft_kv=draft_kv,
        kv_bits=KV_BITS[kv_format],
    )
    return made, kv


class RankExecutor:
    """Stand-in for the ranks: applies plans, checks that each is consistent, and draws random verdicts."""

    def __init__(self, rng: random.Random, *, page_size: int, batch: int, gamma: int, draft_kv: bool = False) -> None:
        self._draft_kv = draft_kv
        self._held: dict[int, int] = {}  # tokens whose draft-model KV exists, by row
        self._rng = rng
        self._page_size, self._batch, self._gamma = page_size, batch, gamma
        self._pages: dict[int, list[int]] = {}
        self._length: dict[int, int] = {}  # committed tokens by row
        self._computed: dict[int, int] = {}

    def execute(self, plan: RoundPlan, requests: list[Request]) -> RoundResult:
        for start in plan.starts:
            self._pages[start.row] = []
            self._length[start.row], self._computed[start.row] = len(start.tokens), start.computed
            self._held[start.row] = 0
            assert start.computed < len(start.tokens)
        for delta in plan.pages:
            pages = self._pages[delta.row]
            assert delta.first <= len(pages)
            pages[delta.first : delta.first + len(delta.pages)] = delta.pages
        rows = [work.row for work in plan.work]
        assert len(set(rows)) == len(rows) == len(requests)
        assert sum(work.new + work.gamma for work in plan.work) <= self._batch
        assert [work.gamma for work in plan.work] == sorted((work.gamma for work in plan.work), reverse=True)
        # A row writes only pages that no other row writes.
        first = {work.row: work.computed // self._page_size for work in plan.work}
        ends = {work.row: -(-(work.computed + work.new + work.gamma) // self._page_size) for work in plan.work}
        written = [page for row in rows for page in self._pages[row][first[row] : ends[row]]]
        assert len(set(written)) == len(written)
        # What lies behind them may have been given back.
        for request in requests:
            end = ends[request.row or 0]
            assert end <= len(request.pages)
            assert self._pages[request.row or 0][:end] == request.pages[:end]
        read = {page for row in rows for page in self._pages[row][: first[row]]}
        assert read.isdisjoint(written)
        assert sum(work.catch_up for work in plan.work) <= self._batch
        results = []
        for request, work in zip(requests, plan.work, strict=True):
            assert request.row == work.row
            self._draft(request, work)
            assert work.computed == self._computed[work.row]
            assert 1 <= work.new <= self._length[work.row] - work.computed
            assert 0 <= work.gamma <= self._gamma
            assert work.samples == (work.computed + work.new == self._length[work.row])
            assert work.gamma == 0 or (work.new == 1 and work.samples)
            # Every slot that the round writes lies in a page of the row.
            assert work.computed + work.new + work.gamma <= len(self._pages[work.row]) * self._page_size
            self._computed[work.row] += work.new
            if work.samples:
                accepted = self._rng.randint(0, work.gamma)
                tokens = [self._rng.choice([EOS, 5, 6, 7, 8, 9]) for _ in range(accepted + 1)]
                self._computed[work.row] += accepted
                self._length[work.row] += accepted + 1
                results.append(RowResult(work.gamma, accepted, tokens, None))
        return RoundResult(plan.number, results, 0.0, 0.0)

    def _draft(self, request: Request, work: RowWork) -> None:
        if not self._draft_kv:
            assert request.draft_lag == work.catch_up == 0
            return
        held = min(self._held[work.row], work.computed)
        assert request.draft_lag == work.computed - held
        assert work.catch_up <= work.computed - held
        assert work.catch_up == 0 or (work.samples and work.new == 1), "the prompt waits until the row drafts"
        held += work.catch_up
        if work.gamma:
            assert work.computed - held <= 1
            held = work.computed + work.gamma
        self._held[work.row] = held


@given(
    seed=st.integers(0, 2**32),
    page_size=st.sampled_from([1, 3, 4, 16]),
    gamma=st.integers(0, 5),
    spare=st.integers(0, 40),
    max_rows=st.integers(1, 6),
    draft_kv=st.booleans(),
)
@examples(75, 300)
def test_random_admit_accept_reject_abort_preempt(
    seed: int, page_size: int, gamma: int, spare: int, max_rows: int, draft_kv: bool
) -> None:
    rng = random.Random(seed)
    max_len = 60
    batch = max_rows + rng.randint(1, 30)
    made, kv = scheduler(
        pages=-(-max_len // page_size) + spare,
        page_size=page_size,
        max_rows=max_rows,
        batch=batch,
        gamma=gamma,
        max_len=max_len,
        max_waiting=25,
        draft_kv=draft_kv,
    )
    ranks = RankExecutor(rng, page_size=page_size, batch=batch, gamma=gamma, draft_kv=draft_kv)
    live: dict[str, int] = {}
    got: dict[str, int] = {}
    added = 0
    for _ in range(2000):
        while added < 25 and rng.random() < 0.4:
            length = rng.choice([1, page_size, page_size + 1, rng.randint(1, 40)])
            params = SamplingParams(max_tokens=rng.randint(1, max_len - length), ignore_eos=rng.random() < 0.5)
            priority = rng.choice([0, 0, -1, 5])
            made.add(AddRequest(str(added), [rng.choice([5, 5, added])] * length, params, priority=priority))
            live[str(added)], got[str(added)] = params.max_tokens, 0
            added += 1
        if live and rng.random() < 0.05:
            gone = rng.choice(sorted(live))
            del live[gone]
            assert made.abort(gone)
        plan, requests = made.schedule()
        made.check()
        if live:
            assert plan.work, "work is left, but nothing runs"
        if rng.random() < 0.05:  # the round does not finish
            made.restart_rows(requests)
            made.check()
            continue
        result = ranks.execute(plan, requests)
        if plan.work and rng.random() < 0.05:
            result.failures = [RowFailure(rng.choice(plan.work).row, "no reason", False)]
        for request, appended, row, failure, _ in made.commit(plan, requests, result):
            got[request.id] += len(appended)
            assert (len(appended) >= 1) == (row is not None)
            if failure is not None:
                assert request.row is None
                del live[request.id]
            elif request.finish_reason is not None:
                assert request.finish_reason == ("stop" if appended[-1] == EOS and request.eos else "length")
                if request.finish_reason == "length":
                    assert got[request.id] == live[request.id]
                del live[request.id]
            else:
                assert request.num_uncomputed == 1  # exactly the pending token
        made.check()
        if added == 25 and not live:
            break
    assert not live, "requests were starved"
    assert not made.has_work
    assert kv.available == kv.total


@pytest.mark.parametrize(("kv_format", "gamma"), [("fp8", 3), ("int8", 2)])
def test_drafts_end_with_a_sealed_page(kv_format: str, gamma: int) -> None:
    made, _ = scheduler(page_size=64, batch=80, kv_format=kv_format)
    ranks = RankExecutor(random.Random(0), page_size=64, batch=80, gamma=3)
    made.add(AddRequest("a", [5] * 61, SamplingParams(max_tokens=40, ignore_eos=True)))
    plan, requests = made.schedule()
    made.commit(plan, requests, ranks.execute(plan, requests))
    plan, _ = made.schedule()
    assert [(work.computed, work.gamma) for work in plan.work] == [(61, gamma)]


def test_decode_rows_come_first_and_prefill_gets_the_rest() -> None:
    made, _ = scheduler(batch=16, gamma=3)
    ranks = RankExecutor(random.Random(0), page_size=4, batch=16, gamma=3)
    made.add(AddRequest("a", [5] * 6, SamplingParams(max_tokens=40, ignore_eos=True)))
    plan, requests = made.schedule()
    made.commit(plan, requests, ranks.execute(plan, requests))
    made.add(AddRequest("b", [5] * 30, SamplingParams(max_tokens=5)))
    plan, requests = made.schedule()
    assert [(work.new, work.gamma, work.samples) for work in plan.work] == [(1, 3, True), (12, 0, False)]
    made.commit(plan, requests, ranks.execute(plan, requests))
    plan, _ = made.schedule()
    assert [(work.new, work.gamma, work.samples) for work in plan.work] == [(1, 3, True), (12, 0, False)]


def test_drafts_are_given_up_before_anyone_is_preempted() -> None:
    """Two rows share four pages of four slots; every draft is rejected."""
    made, kv = scheduler(pages=4, page_size=4, max_rows=2, gamma=3, max_len=16)
    for name, token in (("a", 5), ("b", 6)):
        made.add(AddRequest(name, [token] * 3, SamplingParams(max_tokens=13, ignore_eos=True)))
    seen = []
    for _ in range(7):
        plan, requests = made.schedule()
        seen.append(
            [(request.id, request.num_tokens, work.gamma) for request, work in zip(requests, plan.work, strict=True)]
        )
        results = [RowResult(work.gamma, 0, [5], None) for work in plan.work]
        made.commit(plan, requests, RoundResult(plan.number, results, 0.0, 0.0))
    assert seen == [
        [("a", 3, 0), ("b", 3, 0)],
        [("a", 4, 3), ("b", 4, 3)],
        [("a", 5, 3), ("b", 5, 3)],
        [("a", 6, 2), ("b", 6, 2)],  # a third draft would need a fifth page
        [("a", 7, 1), ("b", 7, 1)],
        [("a", 8, 0), ("b", 8, 0)],
        [("a", 9, 3)],  # a committed token needs a fifth page: the younger row is preempted
    ]
    assert made.preemptions == 1
    assert [request.id for request in made.waiting] == ["b"]
    assert (kv.free, kv.cached) == (0, 1)  # a page of b is cached, the other one belongs to a by now


def test_pages_for_drafts_are_given_back_before_anyone_is_preempted() -> None:
    """Row a has a page for drafts of which none was accepted, and b needs one."""
    made, _ = scheduler(pages=4, page_size=4, max_rows=2, gamma=3, max_len=16)
    made.add(AddRequest("a", [5] * 2, SamplingParams(max_tokens=9, ignore_eos=True)))
    made.add(AddRequest("b", [6] * 7, SamplingParams(max_tokens=9, ignore_eos=True, max_draft_tokens=0)))
    owned = []
    for _ in range(3):
        plan, requests = made.schedule()
        owned.append([len(request.pages) for request in made.running])
        results = [RowResult(work.gamma, 0, [5], None) for work in plan.work]
        made.commit(plan, requests, RoundResult(plan.number, results, 0.0, 0.0))
    assert owned == [[1, 2], [2, 2], [1, 3]]
    assert made.preemptions == 0
    made.check()


def test_rows_that_have_all_their_pages_leave_the_rest_to_others() -> None:
    """Two requests take half of all pages each, to the last slot."""
    made, _ = scheduler(pages=8, page_size=4, max_rows=2, batch=60, max_len=16)
    for name, token in (("a", 5), ("b", 6)):
        made.add(AddRequest(name, [token] * 14, SamplingParams(max_tokens=2, ignore_eos=True)))
    plan, _ = made.schedule()
    assert len(plan.starts) == 2


def test_drafts_of_an_older_row_do_not_cost_a_younger_one_its_place() -> None:
    """One page is free. The committed tokens of both rows fit if the older row does not take it for drafts."""
    made, _ = scheduler(pages=4, page_size=4, max_rows=2, gamma=3, max_len=16)
    made.add(AddRequest("a", [5] * 5, SamplingParams(max_tokens=9, ignore_eos=True)))
    made.add(AddRequest("b", [6] * 4, SamplingParams(max_tokens=9, ignore_eos=True)))
    for _ in range(2):
        plan, requests = made.schedule()
        results = [RowResult(work.gamma, 0, [5], None) for work in plan.work]
        made.commit(plan, requests, RoundResult(plan.number, results, 0.0, 0.0))
    assert made.preemptions == 0
    assert [request.id for request in made.running] == ["a", "b"]


def test_a_tight_budget_is_shared_evenly() -> None:
    made, _ = scheduler(max_rows=4, batch=13, gamma=5, pages=200)
    for i in range(4):
        made.add(AddRequest(str(i), [5] * 3, SamplingParams(max_tokens=60, ignore_eos=True)))
    for _ in range(2):
        plan, requests = made.schedule()
        results = [RowResult(work.gamma, 0, [5], None) for work in plan.work]
        made.commit(plan, requests, RoundResult(plan.number, results, 0.0, 0.0))
    assert [work.gamma for work in plan.work] == [2, 2, 2, 2]
    made.add(AddRequest("late", [5] * 3, SamplingParams()))  # no row is free: no tokens are held back for it
    plan, _ = made.schedule()
    assert [work.gamma for work in plan.work] == [2, 2, 2, 2]


@pytest.mark.parametrize("gamma", [0, 2])
def test_a_long_prompt_catches_up_over_rounds_and_only_to_draft(gamma: int) -> None:
    """The older of two rows catches up first; both keep decoding meanwhile."""
    made, _ = scheduler(batch=40, gamma=gamma, draft_kv=True, pages=100)
    for name, token in (("old", 5), ("new", 6)):
        made.add(AddRequest(name, [token] * 60, SamplingParams(max_tokens=50, ignore_eos=True)))
    ranks = RankExecutor(random.Random(1), page_size=4, batch=40, gamma=gamma, draft_kv=True)
    seen = []
    for _ in range(9):
        plan, requests = made.schedule()
        made.commit(plan, requests, ranks.execute(plan, requests))
        work = {request.id: (item.catch_up, item.gamma) for request, item in zip(requests, plan.work, strict=True)}
        seen.append([work.get(name, (0, 0)) for name in ("old", "new")])
    if gamma == 0:
        assert seen == [[(0, 0), (0, 0)]] * 9
        return
    assert seen[:3] == [[(0, 0), (0, 0)], [(0, 0), (0, 0)], [(40, 0), (0, 0)]]  # prompts, then the first chunk
    assert seen[3:6] == [[(21, 2), (0, 0)], [(0, 2), (40, 0)], [(0, 2), (21, 2)]]  # a row that has caught up drafts
    assert seen[6:] == [[(0, 2), (0, 2)]] * 3


def test_requests_that_can_never_run_are_refused() -> None:
    made, _ = scheduler(max_len=20)
    with pytest.raises(RequestError, match="exceed"):
        made.check_request(AddRequest("x", [5] * 10, SamplingParams(max_tokens=11)))
    made.add(AddRequest("x", [5] * 10, SamplingParams(max_tokens=10)))
    with pytest.raises(RequestError, match="in use"):
        made.add(AddRequest("x", [5], SamplingParams()))
    for i in range(23):
        made.add(AddRequest(str(i), [5], SamplingParams()))
    with pytest.raises(QueueFull):
        made.add(AddRequest("one more", [5], SamplingParams()))


def test_first_come_first_served() -> None:
    made, _ = scheduler(max_rows=2, batch=100)
    for i in range(4):
        made.add(AddRequest(str(i), [5] * 3, SamplingParams()))
    _, requests = made.schedule()
    assert [request.id for request in requests] == ["0", "1"]
    assert [request.id for request in made.waiting] == ["2", "3"]


def test_lower_priorities_come_first() -> None:
    made, _ = scheduler(max_rows=1, batch=100)
    for id, priority in (("a", 0), ("b", 5), ("c", 0), ("d", -1), ("e", 5), ("f", -1)):
        made.add(AddRequest(id, [5] * 3, SamplingParams(), priority=priority))
    assert [request.id for request in made.waiting] == ["d", "f", "a", "c", "b", "e"]
    _, requests = made.schedule()
    made.restart_rows(requests)  # back to its place
    assert [request.id for request in made.waiting] == ["d", "f", "a", "c", "b", "e"]
