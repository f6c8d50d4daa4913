"""Pages of sliding layers hold what rows read, however rows share, are rejected, aborted, preempted or distrusted."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config.deployment import EngineConfig
from engine.messages import AddRequest
from engine.params import SamplingParams
from engine.plan import RoundPlan, RoundResult, RowFailure, RowResult
from engine.scheduler.kv_manager import KVManager
from engine.scheduler.pages import PageLeak
from engine.scheduler.request import Request
from engine.scheduler.scheduler import Scheduler
from engine.scheduler.sliding_pages import SlidingPages, max_sliding_pages, window_room
from tests.support.engines import Scripted
from tests.support.profiles import examples

EOS = 0
MAX_LEN, BATCH, ROWS, GAMMA = 120, 24, 4, 3


def config(page_size: int, rows: int = ROWS, batch: int = BATCH, gamma: int = GAMMA) -> EngineConfig:
    return EngineConfig.model_validate(
        {
            "cache": {"page_size": page_size},
            "scheduler": {"max_rows": rows, "max_batch_tokens": batch},
            "speculation": {"gamma": gamma, "kv": {"policy": "all"}},
        }
    )


class SlidingDevice:
    """Stand-in for the ranks. A slot of its pool holds the tokens up to the position that it was written for, so that a
    row can tell whether the window that it reads is its own."""

    def __init__(self, rng: random.Random, page_size: int, window: int) -> None:
        self._rng, self._page, self._window = rng, page_size, window
        self._tables: dict[int, dict[int, int]] = {}
        self._slots: dict[tuple[int, int], tuple[int, ...]] = {}
        self.seen: Counter[str] = Counter()

    def execute(self, plan: RoundPlan, requests: list[Request], fails: bool) -> RoundResult:
        self.seen["hits"] += sum(start.computed > 0 for start in plan.starts)
        for start in plan.starts:
            self._tables[start.row] = {}
        for delta in plan.pages:
            if delta.sliding:
                self._tables[delta.row] |= dict(enumerate(delta.pages, delta.first))
        results: list[RowResult] = []
        failures: list[RowFailure] = []
        for request, work in zip(requests, plan.work, strict=True):
            drafts = [-1 - self._rng.randrange(1000) for _ in range(work.gamma)]
            text = [*request.tokens[: work.computed + work.new], *drafts]
            for position in range(work.computed, len(text)):
                self._write(work.row, position, tuple(text[: position + 1]))
            for position in range(max(0, work.computed - self._window + 1), len(text)):
                assert self._read(work.row, position) == tuple(text[: position + 1])
            if work.samples:
                accepted = self._rng.randint(0, work.gamma)
                tokens = [self._rng.choice([EOS, *[5, 6] * 15]) for _ in range(accepted + 1)]
                for step, token in enumerate(tokens[:-1]):  # accepted: they were the target's tokens
                    text[work.computed + work.new + step] = token
                    self._write(work.row, work.computed + work.new + step, tuple(text[: work.computed + 2 + step]))
                results.append(RowResult(work.gamma, accepted, tokens, None))
            if fails and not failures:
                self.seen["failures"] += 1
                failures.append(RowFailure(work.row, "not a number", False))
        return RoundResult(plan.number, results, 0.0, 0.0, failures=failures)

    def _write(self, row: int, position: int, content: tuple[int, ...]) -> None:
        self._slots[self._tables[row][position // self._page], position % self._page] = content

    def _read(self, row: int, position: int) -> tuple[int, ...]:
        return self._slots[self._tables[row][position // self._page], position % self._page]


def prompt(rng: random.Random, page_size: int) -> list[int]:
    """Draw a prompt: some begin alike."""
    opening = [rng.choice([2, 3])] * rng.choice([0, page_size, 4 * page_size + 1, 30])
    return [*opening, *(rng.choice([5, 6]) for _ in range(rng.randrange(1, 30)))][:80]


@given(
    seed=st.integers(0, 2**32),
    page_size=st.sampled_from([1, 2, 4, 8]),
    window=st.sampled_from([1, 2, 5, 10, 40]),
    spare=st.integers(0, 90),
    prefix=st.booleans(),
    alone=st.booleans(),
)
@examples(80, 900)
def test_rows_read_their_own_windows(
    seed: int, page_size: int, window: int, spare: int, prefix: bool, alone: bool
) -> None:
    seen = run_at_random(seed, page_size, window, spare, prefix, alone)
    assert not alone or not seen["preemptions"]


def run_at_random(
    seed: int, page_size: int, window: int, spare: int, prefix: bool = True, alone: bool = False
) -> Counter[str]:
    """Run random rounds in a pool with room for the longest request and `spare` pages. alone: the pool of sliding
    layers is that one. Returns what happened."""
    rng, room = random.Random(seed), window_room(config(page_size), window)
    longest = -(-MAX_LEN // page_size)
    pages, count = longest + spare, min(longest + spare, max_sliding_pages(config(page_size), window))
    if alone:
        pages, count = ROWS * (longest + 1), room.pages(1, longest) + spare
    sliding = SlidingPages(count, page_size, window, room=room if alone else None)
    kv = KVManager(pages, page_size, prefix=prefix, sliding=sliding)
    made = Scheduler(
        kv=kv,
        page_size=page_size,
        max_rows=ROWS,
        max_batch_tokens=BATCH,
        max_waiting=50,
        max_model_len=MAX_LEN,
        eos_token_ids=[EOS],
        controller=Scripted([[0, 3, 1], [2], [0], [3, 3, 0, 1]] * 200),
    )
    device, ids = SlidingDevice(rng, page_size, window), iter(range(1000))
    actions: dict[str, Callable[[], object]] = {
        "add": lambda: made.add(
            AddRequest(str(next(ids)), prompt(rng, page_size), SamplingParams(max_tokens=rng.randrange(1, 40)))
        ),
        "abort": lambda: made.abort(rng.choice(made.running).id) if made.running else None,
        "reset": made.reset_prefix_cache,
        "lost": lambda: made.restart_rows(made.schedule()[1]),
    }
    for _ in range(60):
        kind = rng.choices([*actions, "round"], [25, 3, 1, 2, 60])[0]
        if kind in actions and len(made.waiting) < 20:
            actions[kind]()
            kv.check(made._by_id.values())
        elif made.has_work:
            plan, requests = made.schedule()
            made.commit(plan, requests, device.execute(plan, requests, rng.random() < 0.02))
            kv.check(made._by_id.values())
            bound = max_sliding_pages(config(page_size), window)
            assert sum(len(request.sliding_pages) for request in made.running) <= bound
    for id in list(made._by_id):
        made.abort(id)
    kv.check([])
    assert kv.owned == 0
    device.seen["preemptions"] = made.preemptions
    return device.seen


def test_all_of_that_happens() -> None:
    seen = sum((run_at_random(seed, 4, 10, 0) for seed in range(12)), Counter[str]())
    assert min(seen["hits"], seen["failures"], seen["preemptions"]) > 0
    alone = sum((run_at_random(seed, 4, 10, 8, alone=True) for seed in range(12)), Counter[str]())
    assert min(alone["hits"], alone["failures"]) > 0


def test_rows_run_while_windows_have_room() -> None:
    """Where all layers slide, as many rows run as the pool has windows for, short ones as many as their tokens fit."""
    page, window = 4, 10
    room = window_room(config(page), window)
    per_row, kv = room.of_row, KVManager(1000, page, sliding=SlidingPages(60, page, window, room=room))
    long, short = (
        [Request(AddRequest(str(i), [5] * 8, SamplingParams(max_tokens=count)), [], 0) for i in range(20)]
        for count in (300, 8)
    )
    assert kv.num_fitting(long) == (60 - room.of_round) // per_row
    assert kv.num_fitting(short) == 60 // 4
    kv.admit(long[0])
    assert kv.num_fitting(long[1:]) == (60 - room.of_round) // per_row - 1
    kv.release(long[0])
    assert kv.num_fitting(long) == (60 - room.of_round) // per_row
    kv.check([])


# -- one thing at a time ---------------------------------------------------------------------------------------------


def request(tokens: list[int], id: str = "r") -> Request:
    return Request(AddRequest(id, tokens, SamplingParams()), [], 0)


def admit(kv: KVManager, made: Request, computed: int | None = None) -> Request:
    kv.admit(made)
    made.row = 0
    kv.cover(made, made.num_tokens)
    made.num_computed = made.num_tokens if computed is None else computed
    kv.commit(made)
    return made


def manager(pages: int, sliding: int, window: int = 10) -> tuple[KVManager, SlidingPages]:
    own = SlidingPages(sliding, 4, window)
    return KVManager(pages, 4, sliding=own), own


def test_a_request_keeps_its_window_only() -> None:
    kv, sliding = manager(40, 30)
    made = admit(kv, request([*range(50)]))
    assert (made.sliding_first, len(made.sliding_pages)) == (10, 3)  # positions 41 … 49, in pages 10 to 12
    assert (sliding.allocator.owned, sliding.allocator.cached) == (3, 10)
    assert kv.cover(made, 53) == (13, [made.sliding_pages[-1]])
    kv.check([made])


def found(kv: KVManager, length: int) -> int:
    return len(kv.match(request([*range(length)])))


def test_a_hit_ends_where_a_window_is_left() -> None:
    kv, sliding = manager(60, 16)
    kv.release(admit(kv, request([*range(50)])))
    assert found(kv, 25) == 6
    kv.release(admit(kv, request([*range(100, 121)])))  # takes the pages of the first ones
    assert sliding.allocator.owned == sliding.allocator.total - 16
    assert [found(kv, length) for length in (9, 17, 25, 49, 60)] == [0, 0, 6, 12, 12], "the end is there longest"
    late = request([*range(49)])
    kv.admit(late)
    assert (late.num_computed, late.sliding_first, len(late.sliding_pages)) == (48, 9, 3)
    assert late.cached_tokens == kv.hits == 48


def test_a_request_that_is_preempted_at_once_finds_its_window_again() -> None:
    kv, _ = manager(60, 30)
    kv.release(admit(kv, request([*range(50)])))
    late = request([*range(49)])
    kv.admit(late)
    kv.release(late)
    assert len(kv.match(late)) == 12


def test_what_requests_have_in_common_is_kept_once_two_have_had_it() -> None:
    kv, _ = manager(200, 36)
    for turn in range(1, 4):
        made = request([*range(24), *range(1000 * turn, 1000 * turn + 30)])
        kv.release(admit(kv, made))
        assert made.cached_tokens == (24 if turn == 3 else 0)
        kv.release(admit(kv, request([*range(1000 * turn + 500, 1000 * turn + 620)])))


def test_equal_windows_computed_twice_become_one() -> None:
    kv, _ = manager(40, 40)
    first, second = request([*range(20)], "0"), request([*range(20)], "1")
    for each in (first, second):
        kv.admit(each)
        kv.cover(each, 20)
    first.num_computed = second.num_computed = 20
    assert kv.commit(first) == ([], [])
    adopted = kv.commit(second)
    assert [place for place, _ in adopted.pages] == [0, 1, 2, 3, 4]
    assert adopted.sliding == [(2, first.sliding_pages[0]), (3, first.sliding_pages[1]), (4, first.sliding_pages[2])]
    assert second.sliding_pages == first.sliding_pages
    kv.check([first, second])


def test_nothing_is_found_that_a_failed_request_may_have_computed() -> None:
    kv, sliding = manager(40, 40)
    failed, other = admit(kv, request([*range(20)], "0")), admit(kv, request([*range(20), 50, 51], "1"))
    kv.distrust(failed, [failed, other])
    kv.check([failed, other])
    assert not kv.match(request([*range(20)]))
    kv.release(failed)
    kv.release(other)
    assert sliding.allocator.free == 40


def test_check_notices_a_window_that_is_gone() -> None:
    kv, sliding = manager(40, 40)
    made = admit(kv, request([*range(20)]))
    sliding.allocator.release([made.sliding_pages.pop(0)])
    made.sliding_first += 1
    with pytest.raises(PageLeak, match="lacks the window before position 20"):
        kv.check([made])


def test_a_window_that_is_evicted_in_the_round_that_would_share_it() -> None:
    """Two requests are admissible together. The first one's pages evict the window that the second counts on. So the
    second needs more pages than there are, and waits."""
    page, window, pages = 4, 10, 100
    own = SlidingPages(min(pages, max_sliding_pages(config(page, 3, 200), window)), page, window)
    kv = KVManager(pages, page, sliding=own)
    made = Scheduler(
        kv=kv,
        page_size=page,
        max_rows=3,
        max_batch_tokens=200,
        max_waiting=50,
        max_model_len=400,
        eos_token_ids=[EOS],
        controller=Scripted([[0]] * 2000),
    )
    device = SlidingDevice(random.Random(0), page, window)

    def add(id: str, tokens: list[int], count: int) -> None:
        made.add(AddRequest(id, tokens, SamplingParams(max_tokens=count, ignore_eos=True)))

    def run_round() -> RoundPlan:
        plan, requests = made.schedule()
        made.commit(plan, requests, device.execute(plan, requests, False))
        kv.check(made._by_id.values())
        return plan

    opening = [*range(1000, 1160)]
    add("first", [*opening, *range(2000, 2040)], 190)
    for _ in range(3):
        run_round()
    fillers = 0
    last = own.index.find(made.running[0].digests[37])
    assert last is not None
    while (
        own.allocator.free + own.allocator.eviction_order.index(last.page) >= 4
    ):  # until few pages are evicted before it
        fillers += 1
        add(f"filler {fillers}", [*range(10_000 * fillers, 10_000 * fillers + 6)], 1)
        run_round()
    add("evicts", [*range(5000, 5020)], 8)
    add("shares", [*opening, *range(3000, 3040)], 8)
    assert [each.id for each in made._find_admissible()] == ["evicts", "shares"]
    run_round()
    assert [each.id for each in made.running] == ["first", "evicts"]
    assert [each.id for each in made.waiting] == ["shares"]
    while made.running or made.waiting:
        run_round()


@pytest.mark.parametrize("evicted", [False, True])
def test_pages_that_another_request_enters_are_found(evicted: bool) -> None:
    """A request that waits for another one's prefill takes over its window, also if that had been evicted before."""
    page_size, prompt = 4, list(range(100, 165))
    sliding = SlidingPages(40, page_size, 8)
    scheduler = Scheduler(
        kv=KVManager(400, page_size, sliding=sliding),
        page_size=page_size,
        max_rows=4,
        max_batch_tokens=BATCH,
        max_waiting=10,
        max_model_len=MAX_LEN,
        eos_token_ids=[EOS],
        controller=Scripted([0] * 99),
    )
    computed: Counter[str] = Counter()

    def finish(*ids: str) -> None:
        for id in ids:
            scheduler.add(AddRequest(id=id, prompt=prompt, params=SamplingParams(max_tokens=1), arrival=0.0))
        while scheduler.has_work:
            plan, requests = scheduler.schedule()
            for request, work in zip(requests, plan.work, strict=True):
                computed[request.id] += work.new
            rows = [RowResult(0, 0, [7], None) for work in plan.work if work.samples]
            scheduler.commit(plan, requests, RoundResult(plan.number, rows, 0, 0))
            scheduler.check()

    finish("before")
    if evicted:
        pages = sliding.allocator.reserve(sliding.allocator.available)
        assert pages is not None
        sliding.allocator.release(pages)
    finish("first", "second")
    assert computed["first"] == (len(prompt) if evicted else 1)
    assert computed["second"] == 1
