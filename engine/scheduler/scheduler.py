"""Scheduler: admission, the token limit of a round, page reservations, preemption, and the counters after a round."""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Iterable
from itertools import count, islice
from typing import NamedTuple

from engine.messages import AddRequest
from engine.plan import PageDelta, RoundPlan, RoundResult, RowFailure, RowResult, RowStart, RowWork
from engine.scheduler.controller import Controller
from engine.scheduler.pages import PageAllocator
from engine.scheduler.prefill import PrefillNeed, share_prefill
from engine.scheduler.request import Request
from engine.scheduler.validation import QueueFull, RequestError

_MAX_PROMPT_LOGPROBS = 256
"""Maximum tokens of a chunk that needs prompt logprobs: each takes logits of the whole vocabulary."""


class Committed(NamedTuple):
    """Outcome of a round for one request. tokens: those appended to it. row: None if it sampled none. failure: why it
    has failed; its tokens are valid."""

    request: Request
    tokens: list[int]
    row: RowResult | None
    failure: RowFailure | None


class Scheduler:
    """Planner of rounds, one at a time.

    Invariant between rounds: every running row owns pages for all its computed tokens, and a decoding row has exactly
    its pending token uncomputed.

    Decode rows come first, each with its drafts. The tokens left in the round are shared by prefills, running and
    waiting ones (engine.scheduler.prefill). A request is admitted when pages for all its tokens are free, so that a
    prefill in progress never waits for pages. When a decoding row needs a page and none is free, drafts are dropped
    first; then the least urgent request is preempted. Its pages are freed, and it returns to the queue to recompute its
    KV. Requests are urgent by priority, then by arrival; a waiting one never preempts a running one.
    """

    def __init__(
        self,
        *,
        pages: PageAllocator,
        page_size: int,
        max_rows: int,
        max_batch_tokens: int,
        max_waiting: int,
        max_model_len: int,
        eos_token_ids: Iterable[int],
        controller: Controller,
        draft_kv: bool = False,
        num_uncached_prompt_tokens: int = 1,
    ) -> None:
        """draft_kv: whether drafts read KV of their own, which must be computed for a row's tokens before it drafts.
        num_uncached_prompt_tokens: number of tokens at the end of a prompt that a row always computes itself.
        """
        self._pages = pages
        self._page_size = page_size
        self._max_batch_tokens = max_batch_tokens
        self._max_requests = max_rows + max_waiting
        self._max_model_len = max_model_len
        self._eos = tuple(eos_token_ids)
        self.controller = controller
        self._draft_kv = draft_kv
        self._num_uncached_prompt_tokens = num_uncached_prompt_tokens
        self._free_rows = list(range(max_rows - 1, -1, -1))
        self._by_id: dict[str, Request] = {}
        self.waiting: list[Request] = []  # most urgent first
        self.running: list[Request] = []  # in order of admission
        self.preemptions = 0
        self._round = 0
        self._numbers = count()

    # -- requests --------------------------------------------------------------------------------------------------

    def add(self, message: AddRequest) -> None:
        """Queue a request that passed `check_request`. Raises RequestError if its id is in use, QueueFull."""
        if message.id in self._by_id:
            raise RequestError(f"request id {message.id!r} is in use")
        if len(self._by_id) >= self._max_requests:
            raise QueueFull(f"{len(self._by_id)} requests are running or waiting already")
        request = Request(message, self._eos, next(self._numbers))
        request.prefix_source = self._find_prefix_source(message)
        self._by_id[request.id] = request
        insort(self.waiting, request, key=_urgency)

    def check_request(self, message: AddRequest) -> None:
        """Raise RequestError for a request that is too long to run."""
        total = len(message.prompt) + message.params.max_tokens
        if total > self._max_model_len:
            raise RequestError(
                f"{len(message.prompt)} prompt tokens and max_tokens {message.params.max_tokens} exceed the model's "
                f"{self._max_model_len} tokens"
            )

    def abort(self, request_id: str) -> bool:
        """Drop a request and free its pages at once; False if its id is unknown."""
        request = self._by_id.pop(request_id, None)
        if request is None:
            return False
        if request.row is None:
            self.waiting.remove(request)
        else:
            self._release_row(request)
        return True

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def check(self) -> None:
        """Raise PageLeak unless every page is free or owned by a running request."""
        self._pages.check(request.pages for request in self._by_id.values())

    # -- one round -------------------------------------------------------------------------------------------------

    def schedule(self) -> tuple[RoundPlan, list[Request]]:
        """Plan the next round. Returns the plan and the requests of its `work`, in the same order."""
        self._round += 1
        plan = RoundPlan(self._round, [], [], [])
        work: list[tuple[Request, RowWork]] = []
        tokens_left = self._max_batch_tokens
        tokens_left -= self._plan_decodes(plan, work, tokens_left)
        self._plan_prefills(plan, work, tokens_left)
        work.sort(key=lambda item: -item[1].gamma)
        plan.work = [item for _, item in work]
        return plan, [request for request, _ in work]

    def _plan_decodes(self, plan: RoundPlan, work: list[tuple[Request, RowWork]], tokens_left: int) -> int:
        """Plan every decoding row, with as many drafts as tokens, limits and pages allow. Returns the number of tokens
        planned.

        All rows get the page of their pending token before any row gets pages for drafts. Before a row drafts, the
        draft model catches up on the row's tokens that it lacks: oldest row first, and at most `max_batch_tokens`
        tokens of all rows per round, which limits the delay that a long prompt causes to the other rows.
        """
        for request in [request for request in self.running if request.decoding]:
            if request.row is not None:  # else preempted for an earlier row
                self._reserve_or_preempt(plan, request, request.num_tokens)
        rows = [request for request in self.running if request.decoding]
        if not rows:
            return 0
        spare = tokens_left - len(rows)  # each row has one token; drafts share the rest evenly
        if len(rows) < len(self.running) or (self.waiting and self._free_rows):
            spare //= 2  # half of it is for prefills, which a full batch could block forever
        share = spare // len(rows)
        planned, catch_up_left = 0, self._max_batch_tokens
        gammas = self.controller.choose(rows)
        plan.budget = self.controller.budget
        for request, wanted in zip(rows, gammas, strict=True):
            gamma = max(0, min(wanted, share, request.max_draft_tokens))
            catch_up = 0
            if gamma and request.draft_lag > 1:  # one missing token is fed together with the pending one
                catch_up = min(request.draft_lag, catch_up_left)
                catch_up_left -= catch_up
                gamma = gamma if catch_up == request.draft_lag else 0
            if not self._reserve(plan, request, request.num_tokens + gamma):
                gamma = min(gamma, request.num_reserved - request.num_tokens)
            assert request.row is not None
            planned += 1 + gamma
            work.append((request, RowWork(request.row, request.num_computed, 1, gamma, True, catch_up)))
        return planned

    def _plan_prefills(self, plan: RoundPlan, work: list[tuple[Request, RowWork]], tokens_left: int) -> None:
        """Plan prefill chunks of running and waiting requests. A waiting one that gets tokens is admitted."""
        if tokens_left <= 0:
            return
        requests = [request for request in self.running if not request.decoding] + self._find_admissible()
        requests.sort(key=_urgency)
        needs = [self._prefill_need(request) for request in requests]
        for request, new in zip(requests, share_prefill(needs, tokens_left), strict=True):
            if not new:
                continue
            if request.row is None:
                self._admit(plan, request)
            logprobs = 0
            if request.params.prompt_logprobs is not None:
                logprobs = max(0, min(new, request.num_prompt - 1 - request.num_computed))
            assert request.row is not None
            samples = new == request.num_uncomputed and request.params.max_tokens > 0
            row_work = RowWork(request.row, request.num_computed, new, 0, samples, num_prompt_logprobs=logprobs)
            work.append((request, row_work))

    def _prefill_need(self, request: Request) -> PrefillNeed:
        """Describe the tokens that a request computes from now on, once admitted if it waits."""
        remaining = request.num_uncomputed
        if request.row is None:
            remaining -= len(self._shared_pages(request)) * self._page_size
        limit = remaining if request.params.prompt_logprobs is None else min(remaining, _MAX_PROMPT_LOGPROBS)
        return PrefillNeed(request.priority, remaining, limit)

    def _find_admissible(self) -> list[Request]:
        """Find the waiting requests that could be admitted together, most urgent first, while rows and pages last."""
        found: list[Request] = []
        free, running = self._pages.free, len(self.running)
        for request in self.waiting:
            if len(found) == len(self._free_rows):
                break
            prefix_source = request.prefix_source
            if prefix_source is not None and prefix_source.row is not None and not prefix_source.num_output:
                continue  # wait until the source has computed its whole prompt, and so has its first token
            needed = self._num_pages_needed(request)
            # One page per running row stays free, so that an admission does not cause a preemption in the next round.
            if needed + running > free and (running or needed > free):
                break
            found.append(request)
            free, running = free - needed, running + 1
        return found

    def _num_pages_needed(self, request: Request) -> int:
        return -(-request.num_tokens // self._page_size) - len(self._shared_pages(request))

    def _admit(self, plan: RoundPlan, request: Request) -> None:
        """Give a waiting request a row, and pages for all of its tokens, which are free."""
        shared, pages = self._shared_pages(request), self._pages.reserve(self._num_pages_needed(request))
        assert pages is not None
        self.waiting.remove(request)
        request.row = self._free_rows.pop()
        self._pages.share(shared)
        self._add_pages(request, shared + pages)
        request.num_computed = len(shared) * self._page_size
        request.draft_lag = request.num_computed if self._draft_kv else 0
        request.scheduled = request.scheduled or time.monotonic()
        self.running.append(request)
        plan.starts.append(
            RowStart(
                request.row,
                request.tokens[:],
                request.num_prompt,
                request.params,
                sorted(request.stop_ids),
                request.num_computed,
                bool(shared),
            )
        )
        plan.pages.append(PageDelta(request.row, 0, request.pages[:]))

    def _find_prefix_source(self, message: AddRequest) -> Request | None:
        """Find the request whose prompt this one can share."""
        prefix_source = self._by_id.get(message.share_prompt_with) if message.share_prompt_with else None
        if prefix_source is None or message.params.prompt_logprobs is not None:
            return None
        return prefix_source if prefix_source.tokens[: prefix_source.num_prompt] == message.prompt else None

    def _shared_pages(self, request: Request) -> list[int]:
        """Find the whole pages of the prompt that the prefix source has computed. The row computes the rest itself."""
        prefix_source = request.prefix_source
        if prefix_source is None or prefix_source.row is None:
            return []
        tokens = min(prefix_source.num_computed, request.num_prompt - self._num_uncached_prompt_tokens)
        return prefix_source.pages[: max(0, tokens) // self._page_size]

    def _reserve(self, plan: RoundPlan, request: Request, slots: int) -> bool:
        """Reserve pages for `slots` KV slots in total; False, and nothing changes, if too few are free."""
        if slots <= request.num_reserved:
            return True
        pages = self._pages.reserve(-(-(slots - request.num_reserved) // self._page_size))
        if pages is None:
            return False
        assert request.row is not None
        plan.pages.append(PageDelta(request.row, len(request.pages), pages))
        self._add_pages(request, pages)
        return True

    def _add_pages(self, request: Request, pages: list[int]) -> None:
        request.pages += pages
        request.num_reserved += len(pages) * self._page_size

    def _reserve_or_preempt(self, plan: RoundPlan, request: Request, slots: int) -> bool:
        """Reserve, preempting the least urgent requests; False if `request` itself was preempted."""
        while not self._reserve(plan, request, slots):
            victim = max(self.running, key=_urgency)
            # What it reserved in this round now belongs to others.
            plan.pages = [delta for delta in plan.pages if delta.row != victim.row]
            self._requeue(victim)
            self.preemptions += 1
            if victim is request:
                return False
        return True

    def restart_rows(self, requests: Iterable[Request]) -> None:
        """Put the requests of a round that did not finish back into the queue, to recompute their KV. Their tokens, and
        so their texts, do not change."""
        for request in requests:
            self._requeue(request)

    def _requeue(self, request: Request) -> None:
        self._release_row(request)
        request.num_computed = request.draft_lag = 0
        insort(self.waiting, request, key=_urgency)

    def _release_row(self, request: Request) -> None:
        """Free the request's row and pages."""
        assert request.row is not None
        self._pages.release(request.pages)
        request.pages, request.num_reserved = [], 0
        self._free_rows.append(request.row)
        request.row = None
        self.running.remove(request)

    def commit(self, plan: RoundPlan, requests: list[Request], result: RoundResult) -> list[Committed]:
        """Advance counters by the round's result, and end the requests that are done or have failed.

        Returns one entry per row that sampled, ended or failed. Rejected drafts need no undoing: `num_computed` does
        not count them.
        """
        outcomes = iter(result.rows)
        prompt_logprobs = iter(result.prompt_logprobs)
        failures = {failure.row: failure for failure in result.failures}
        committed = []
        for request, work in zip(requests, plan.work, strict=True):
            if work.num_prompt_logprobs:  # a recomputed prompt's entries are replaced
                request.prompt_logprobs[work.computed :] = islice(prompt_logprobs, work.num_prompt_logprobs)
            request.num_computed += work.new
            if self._draft_kv:
                request.draft_lag += work.new - work.catch_up
            outcome, tokens = None, []
            if work.samples:
                outcome = next(outcomes)
                request.num_computed += outcome.accepted
                if self._draft_kv and work.gamma:  # if all drafts were accepted, the last one was never fed
                    request.draft_lag = int(outcome.accepted == work.gamma)
                tokens = request.commit(outcome.tokens)
            failure = failures.get(work.row) if request.finish_reason is None else None
            if failure is None:
                request.finish_if_scored()
            if request.finish_reason is not None or failure is not None:
                self._release_row(request)
                del self._by_id[request.id]
            if outcome is not None or failure is not None or request.finish_reason is not None:
                committed.append(Committed(request, tokens, outcome, failure))
        self.controller.observe(plan, requests, result)
        return committed


def _urgency(request: Request) -> tuple[int, int]:
    """Sort key: the most urgent request first."""
    return request.priority, request.number
