"""The scheduler with a prefix cache against random results: each row reads the KV of its own tokens, and no other.

The stand-in for the ranks keeps, for every KV slot, which tokens its KV was computed from.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count

from hypothesis import given
from hypothesis import strategies as st

from engine.messages import AddRequest, PromptLogprobs
from engine.ngram.ngram_drafts import Proposal
from engine.params import SamplingParams
from engine.plan import RoundPlan, RoundResult, RowFailure, RowResult, RowWork
from engine.scheduler.controller import FixedGamma, RowDrafts
from engine.scheduler.kv_audit import KVAudit
from engine.scheduler.kv_manager import KVManager
from engine.scheduler.request import Request
from engine.scheduler.scheduler import Scheduler
from tests.support.profiles import examples

EOS = 0
WORDS = [5] * 20 + [6, 7, EOS]
"""Requests often go on alike by chance."""
MAX_LEN = 60
NUM_REQUESTS = 25

Mark = int
"""Stands for a salt and a sequence of tokens; negative: KV of no such sequence."""
_junk = count(-1, -1)


def extend_marks(marks: list[Mark], tokens: Iterable[int]) -> list[Mark]:
    """Append the mark of each further token. The first mark is that of the salt alone."""
    for token in tokens:
        marks.append(abs(hash((marks[-1], token))))
    return marks


@dataclass
class Tally:
    """What happened in a run."""

    hits: int = 0
    adopted: int = 0
    drafted: int = 0
    prompts_scored: int = 0


@dataclass
class HeldRow:
    """A row slot as the ranks know it. held: tokens whose KV a draft model has computed."""

    marks: list[Mark]
    table: list[int]
    computed: int
    held: int


@dataclass
class MarkedRanks:
    """Stand-in for the ranks over pools whose slots hold marks in place of KV."""

    rng: random.Random
    kv: KVManager
    pages: int
    page_size: int
    num_uncached: int
    draft_kv: bool
    draft_pages: bool
    salts: dict[str, str] = field(default_factory=dict)
    tally: Tally = field(default_factory=Tally)

    def __post_init__(self) -> None:
        self.target = [[next(_junk) for _ in range(self.page_size)] for _ in range(self.pages)]
        self.draft = [[next(_junk) for _ in range(self.page_size)] for _ in range(self.pages)]
        self.rows: dict[int, HeldRow] = {}
        self.started: set[int] = set()

    # -- a round -----------------------------------------------------------------------------------------------------

    def execute(self, plan: RoundPlan, requests: list[Request], *, lost: bool = False) -> RoundResult:
        """Run a round. lost: it ends early, after some of its KV was written, which may be wrong."""
        audit = [abs(hash(tuple(self.target[page]))) for page in plan.audit]
        self._apply(plan, requests)
        self._check_writes(plan, requests)
        results, scored, failures = [], [], []
        for request, work in zip(requests, plan.work, strict=True):
            row = self.rows[work.row]
            self._check_read(request, work)
            failed = lost or self.rng.random() < 0.01
            drafts = [self.rng.choice(WORDS) for _ in range(work.gamma)]
            accepted = self.rng.randint(0, work.gamma) if work.samples else 0
            marks = extend_marks(row.marks[:], drafts)
            self._draft(request, work, marks)
            # Where a row fails, its accepted drafts are right, and it has no bonus token.
            valid = work.computed + (work.new + work.gamma if not failed else accepted if work.samples else 0)
            for at in range(work.computed, work.computed + work.new + work.gamma):
                self._write(self.target, row, at, marks[at + 1] if at < valid else next(_junk))
            scored += [
                PromptLogprobs(row.marks[at + 1], 0.0, 1, [], [])
                for at in range(work.computed, work.computed + work.num_prompt_logprobs)
            ]
            row.computed += work.new
            if work.samples:
                tokens = [*drafts[:accepted], *([] if failed else [self.rng.choice(WORDS)])]
                extend_marks(row.marks, tokens)
                row.computed += accepted
                results.append(RowResult(work.gamma, accepted, tokens, None))
            if failed and not lost:
                failures.append(RowFailure(work.row, "no reason", False))
        return RoundResult(plan.number, results, 0.0, 0.0, scored, failures, audit)

    def _apply(self, plan: RoundPlan, requests: Sequence[Request]) -> None:
        by_row = {request.row: request for request in requests}
        self.started = {start.row for start in plan.starts}
        assert {start.row for start in plan.starts} <= by_row.keys()
        for start in plan.starts:
            request = by_row[start.row]
            assert start.tokens == request.tokens
            assert start.computed % self.page_size == 0
            assert start.computed <= max(0, len(start.tokens) - self.num_uncached)
            if request.params.prompt_logprobs is not None:
                assert start.computed == 0
            self.tally.hits += start.computed
            marks = extend_marks([hash(self.salts[request.id])], start.tokens)
            held = start.computed - request.draft_lag if self.draft_kv else 0
            self.rows[start.row] = HeldRow(marks, [], start.computed, held)
        places: Counter[tuple[int, int]] = Counter()
        for delta in plan.pages:
            table = self.rows[delta.row].table
            places.update((delta.row, delta.first + i) for i in range(len(delta.pages)))
            assert delta.first <= len(table)
            if delta.row not in self.started:
                computed = self.rows[delta.row].computed // self.page_size
                self.tally.adopted += max(0, min(len(delta.pages), computed - delta.first))
            table[delta.first : delta.first + len(delta.pages)] = delta.pages
        assert max(places.values(), default=1) == 1, "ranks may set a place only once"
        for request in requests:
            assert request.row is not None
            table = self.rows[request.row].table
            assert table[: len(request.pages)] == request.pages
            del table[len(request.pages) :]  # given back
        for start in plan.starts:
            self._check_held(self.rows[start.row], self.rows[start.row].held)

    def _check_writes(self, plan: RoundPlan, requests: Sequence[Request]) -> None:
        """A page that a row writes is in the list of no other row, and the index does not name it."""
        listed = Counter(page for request in self._running(requests) for page in request.pages)
        indexed = {entry.page for entry in self.kv.indices[0].entries}
        for work in plan.work:
            table, size = self.rows[work.row].table, self.page_size
            written = table[work.computed // size : -(-(work.computed + work.new + work.gamma) // size)]
            assert work.computed + work.new + work.gamma <= len(table) * size
            for page in written:
                assert listed[page] == 1
                assert page not in indexed

    def _check_read(self, request: Request, work: RowWork) -> None:
        row = self.rows[work.row]
        assert work.computed == row.computed == request.num_computed
        assert len(row.marks) == request.num_tokens + 1
        assert 1 <= work.new <= request.num_uncomputed
        assert work.samples == (work.computed + work.new == request.num_tokens and request.params.max_tokens > 0)
        for at in range(work.computed):
            assert self._read(self.target, row, at) == row.marks[at + 1], f"token {at} of {request.id!r}"

    def _draft(self, request: Request, work: RowWork, marks: Sequence[Mark]) -> None:
        """Catch up and draft. marks: of the row's tokens and of its drafts."""
        if not self.draft_kv:
            assert request.draft_lag == work.catch_up == 0
            return
        row = self.rows[work.row]
        held = work.computed - request.draft_lag
        assert 0 <= held <= row.held
        decodes = work.samples and work.new == 1 and request.num_output > 0 and work.row not in self.started
        assert work.draft_lag == (request.draft_lag if decodes or work.draft_lag else 0)
        assert work.catch_up <= work.draft_lag
        end = held + work.catch_up
        if work.gamma:
            assert work.computed - end <= 1
            self.tally.drafted += 1
            self._check_held(row, held)
            end = work.computed + work.gamma
        for at in range(held, end):
            self._write(self.draft, row, at, marks[at + 1])
        row.held = end

    def _check_held(self, row: HeldRow, end: int) -> None:
        """Check that the draft model's KV of the row's first `end` tokens is there."""
        for at in range(end if self.draft_pages else 0):
            assert self._read(self.draft, row, at) == row.marks[at + 1], f"the draft lacks token {at}"

    def _read(self, pool: list[list[Mark]], row: HeldRow, at: int) -> Mark:
        return pool[row.table[at // self.page_size]][at % self.page_size]

    def _write(self, pool: list[list[Mark]], row: HeldRow, at: int, mark: Mark) -> None:
        pool[row.table[at // self.page_size]][at % self.page_size] = mark

    # -- between rounds ----------------------------------------------------------------------------------------------

    def check_between(self, running: Sequence[Request], controller: RandomGamma) -> None:
        """Check what the scheduler knows of running rows, whether they are in the next round or not."""
        self._running_now = list(running)
        holders: dict[Mark, int] = {}
        for request in running:
            marks = extend_marks([hash(self.salts[request.id])], request.tokens)
            for at in range(request.num_computed):
                held = self.target[request.pages[at // self.page_size]][at % self.page_size]
                assert held == marks[at + 1], f"token {at} of {request.id!r}"
            if request.is_private:
                continue
            assert request.num_indexed == request.num_computed // self.page_size
            for place in range(request.num_indexed):  # equal beginnings are in the same pages
                page = request.pages[place]
                assert holders.setdefault(marks[(place + 1) * self.page_size], page) == page
        owners = Counter(page for request in running for page in request.pages)
        stretch = controller.stretch
        shared = [page for request in running for page in request.pages[stretch - 1 :: stretch]] if stretch else []
        controller.expected = sum(owners[page] - 1 for page in set(shared)) * stretch * self.page_size

    def _running(self, requests: Sequence[Request]) -> Iterable[Request]:
        """Rows that ran before the round and still do, and those that it starts."""
        return {id(each): each for each in [*self._running_now, *requests] if each.row is not None}.values()


class RandomGamma(FixedGamma):
    """Controller that draws gamma per row, and checks how many tokens rows share. stretch: in pages; 0: not counted.
    expected: the number of tokens as of the last round's end."""

    def __init__(self, rng: random.Random, gamma: int, stretch: int) -> None:
        super().__init__(gamma)
        self._rng, self.stretch, self.expected = rng, stretch, 0
        self.preempted = False

    def choose(
        self,
        rows: Sequence[Request],
        shared_tokens: int = 0,
        proposals: Sequence[Proposal] = (),
        share: int | None = None,
    ) -> list[RowDrafts]:
        assert shared_tokens <= self.expected  # preemptions lower it
        return [RowDrafts(0, self._rng.randint(0, self.gamma_max)) for _ in rows]


class Load:
    """Random requests that share beginnings with what others have said so far."""

    def __init__(self, rng: random.Random, page_size: int) -> None:
        self._rng, self._page_size = rng, page_size
        self.made: list[Request] = []
        self.salts: dict[str, str] = {}
        self.max_tokens: dict[str, int] = {}

    def next(self) -> AddRequest:
        rng, page, id = self._rng, self._page_size, str(len(self.max_tokens))
        prompt: list[int] = []
        if self.made and rng.random() < 0.8:
            prompt = rng.choice(self.made).tokens
            prompt = prompt[: rng.choice([len(prompt), len(prompt) // 2, page, 2 * page])]
        tail = rng.choice([1, page - 1, page, page + 1, rng.randint(1, 30)])
        prompt = [*prompt, *(rng.choice(WORDS[:-1]) for _ in range(max(tail, 0)))][: MAX_LEN - 2] or [5]
        scored = rng.random() < 0.1
        params = SamplingParams(
            max_tokens=0 if scored and rng.random() < 0.3 else rng.randint(1, MAX_LEN - len(prompt)),
            ignore_eos=rng.random() < 0.7,
            prompt_logprobs=0 if scored else None,
        )
        self.salts[id], self.max_tokens[id] = rng.choice(["", "", "", "salt"]), params.max_tokens
        return AddRequest(id, prompt, params, priority=rng.choice([0, 0, -1, 5]), cache_salt=self.salts[id])


def play(
    seed: int,
    *,
    page_size: int,
    gamma: int,
    spare: int,
    max_rows: int,
    draft_kv: bool,
    draft_pages: bool,
    num_uncached: int,
    stretch: int,
) -> tuple[Scheduler, KVManager, Tally]:
    """Run a random load in a pool of `spare` pages more than one request may need."""
    rng = random.Random(seed)
    pages = -(-MAX_LEN // page_size) + spare
    kv = KVManager(
        pages,
        page_size,
        num_uncached_tokens=num_uncached,
        draft_pages=draft_kv and draft_pages,
        shared_stretch=stretch * page_size,
    )
    controller = RandomGamma(rng, gamma, stretch)
    made = Scheduler(
        kv=kv,
        page_size=page_size,
        max_rows=max_rows,
        max_batch_tokens=max_rows + rng.randint(1, 30),
        max_waiting=NUM_REQUESTS,
        max_model_len=MAX_LEN,
        eos_token_ids=[EOS],
        controller=controller,
        draft_kv=draft_kv,
        audit=KVAudit(kv, exact=True) if rng.random() < 0.5 else None,
    )
    load = Load(rng, page_size)
    ranks = MarkedRanks(rng, kv, pages, page_size, num_uncached, draft_kv, draft_pages, load.salts)
    live: dict[str, Request] = {}
    for _ in range(3000):
        while len(load.max_tokens) < NUM_REQUESTS and rng.random() < 0.3:
            message = load.next()
            made.add(message)
            request = next(each for each in made.waiting if each.id == message.id)
            live[message.id] = request
            load.made.append(request)
        if live and rng.random() < 0.03:
            gone = rng.choice(sorted(live))
            del live[gone]
            assert made.abort(gone)
        if rng.random() < 0.02:
            made.reset_prefix_cache()
            assert kv.cached == 0
        ranks.check_between(made.running, controller)
        plan, requests = made.schedule()
        made.check()
        if live:
            assert plan.work, "work is left, but nothing runs"
        chance = rng.random()
        if chance < 0.06:  # the round is lost: before or after it reached the ranks, or for lack of memory
            if chance > 0.02:
                ranks.execute(plan, requests, lost=True)
            if chance > 0.04:
                for request in requests:
                    made.abort(request.id)
                    del live[request.id]
            else:
                made.restart_rows(requests)
            made.check()
            continue
        result = ranks.execute(plan, requests)
        if rng.random() < 0.02:
            made.reset_prefix_cache()
        for request, _, _, failure, _ in made.commit(plan, requests, result):
            if request.params.prompt_logprobs is not None and failure is None:
                marks = extend_marks([hash(load.salts[request.id])], request.tokens)
                assert [each.token for each in request.prompt_logprobs] == marks[1 : request.num_prompt]
                ranks.tally.prompts_scored += 1
            if failure is not None or request.finish_reason is not None:
                if request.finish_reason is not None and request.params.max_tokens > 0:
                    assert request.num_computed == request.num_tokens - 1
                del live[request.id]
        made.check()
        if len(load.max_tokens) == NUM_REQUESTS and not live:
            break
    assert not live, "requests were starved"
    assert not made.has_work
    assert kv.available == kv.total
    assert kv.shared_tokens == 0
    return made, kv, ranks.tally


@given(
    seed=st.integers(0, 2**32),
    page_size=st.sampled_from([1, 2, 3, 4, 16]),
    gamma=st.integers(0, 4),
    spare=st.integers(0, 40),
    max_rows=st.integers(1, 6),
    draft_kv=st.booleans(),
    draft_pages=st.booleans(),
    num_uncached=st.sampled_from([1, 1, 6]),
    stretch=st.integers(0, 3),
)
@examples(25, 1500)
def test_rows_read_their_own_tokens_only(seed: int, **others: int) -> None:
    play(seed, **others)  # type: ignore[arg-type]


def test_those_loads_share_evict_and_preempt() -> None:
    """What happens in one of the loads above happens in each."""
    for draft_kv in (False, True):
        made, kv, tally = play(
            5, page_size=4, gamma=3, spare=3, max_rows=5, draft_kv=draft_kv, draft_pages=True, num_uncached=1, stretch=1
        )
        assert min(tally.hits, tally.adopted, tally.prompts_scored, made.preemptions, kv.evictions) > 0
        assert (tally.drafted > 0) == draft_kv
