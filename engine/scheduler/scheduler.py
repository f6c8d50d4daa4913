"""Scheduler: admission, the token limit of a round, page reservations, preemption, and the counters after a round."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from itertools import islice

from engine.messages import AddRequest
from engine.plan import PageDelta, RoundPlan, RoundResult, RowStart, RowWork
from engine.scheduler.controller import Controller
from engine.scheduler.pages import PageAllocator
from engine.scheduler.request import Request

_MAX_PROMPT_LOGPROBS = 256
"""Maximum tokens of a chunk that needs prompt logprobs: each takes logits of the whole vocabulary."""


class RequestError(ValueError):
    """A request that this engine can never serve, or cannot queue now."""


class QueueFull(RequestError):
    """Too many requests are running or waiting."""


class Scheduler:
    """Planner of rounds, one at a time.

    Invariant between rounds: every running row owns pages for all its computed tokens, and a decoding row has exactly
    its pending token uncomputed.

    Decode rows come first, each with its drafts. The tokens left in the round go to prefill chunks, oldest request
    first, then to new requests. A request is admitted when pages for all its tokens are free, so that a prefill in
    progress never waits for pages. When a decoding row needs a page and none is free, drafts are dropped first; then
    the request admitted last is preempted. Its pages are freed, and it returns to the queue before others of its
    priority, to recompute its KV. Priorities order waiting requests only; they never preempt a running one.
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
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in order of admission
        self.preemptions = 0
        self._round = 0

    # -- requests --------------------------------------------------------------------------------------------------

    def add(self, message: AddRequest) -> None:
        """Queue a request that passed `check_request`. Raises RequestError if its id is in use, QueueFull."""
        if message.id in self._by_id:
            raise RequestError(f"request id {message.id!r} is in use")
        if len(self._by_id) >= self._max_requests:
            raise QueueFull(f"{len(self._by_id)} requests are running or waiting already")
        request = Request(message, self._eos)
        request.prefix_source = self._find_prefix_source(message)
        self._by_id[request.id] = request
        place = len(self.waiting)
        while place and self.waiting[place - 1].priority > request.priority:
            place -= 1
        self.waiting.insert(place, request)

    def check_request(self, message: AddRequest) -> None:
        """Raise RequestError for a request that can never run."""
        if not message.prompt:
            raise RequestError("the prompt has no tokens")
        if message.params.max_tokens < 1:
            raise RequestError("max_tokens must be at least 1")
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
        # Preemption takes rows from the end of `running`, and never one that is planned already, since rows are planned
        # in order of admission.
        work: list[tuple[Request, RowWork]] = []
        tokens_left = self._max_batch_tokens
        tokens_left -= self._plan_decodes(plan, work, tokens_left)
        tokens_left -= self._plan_prefills(work, tokens_left)
        self._admit(plan, work, tokens_left)
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

    def _plan_prefills(self, work: list[tuple[Request, RowWork]], tokens_left: int) -> int:
        planned = 0
        for request in self.running:
            if not request.decoding and planned < tokens_left:
                planned += self._plan_chunk(request, work, tokens_left - planned)
        return planned

    def _plan_chunk(self, request: Request, work: list[tuple[Request, RowWork]], tokens_left: int) -> int:
        assert request.row is not None
        new, logprobs = min(request.num_uncomputed, tokens_left), 0
        if request.params.prompt_logprobs is not None:
            new = min(new, _MAX_PROMPT_LOGPROBS)
            logprobs = max(0, min(new, request.num_prompt - 1 - request.num_computed))
        samples = new == request.num_uncomputed
        row_work = RowWork(request.row, request.num_computed, new, 0, samples, num_prompt_logprobs=logprobs)
        work.append((request, row_work))
        return new

    def _admit(self, plan: RoundPlan, work: list[tuple[Request, RowWork]], tokens_left: int) -> None:
        """Admit waiting requests by priority, then in order of arrival, while rows, tokens and pages last."""
        for request in list(self.waiting):
            if not self._free_rows or tokens_left <= 0:
                return
            prefix_source = request.prefix_source
            if prefix_source is not None and prefix_source.row is not None and not prefix_source.num_output:
                continue  # wait until the source has computed its whole prompt, and so has its first token
            shared = self._shared_pages(request)
            needed = -(-request.num_tokens // self._page_size) - len(shared)
            # One page per running row stays free, so that an admission does not cause a preemption in the next round.
            if needed + len(self.running) > self._pages.free and self.running:
                return
            pages = self._pages.reserve(needed)
            if pages is None:
                return
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
            tokens_left -= self._plan_chunk(request, work, tokens_left)

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
        """Reserve, preempting requests admitted later; False if `request` itself was preempted."""
        while not self._reserve(plan, request, slots):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _preempt(self, request: Request) -> None:
        self._release_row(request)
        request.num_computed = request.draft_lag = 0
        self.preemptions += 1
        before = 0
        while before < len(self.waiting) and self.waiting[before].priority < request.priority:
            before += 1
        self.waiting.insert(before, request)

    def _release_row(self, request: Request) -> None:
        """Free the request's row and pages."""
        assert request.row is not None
        self._pages.release(request.pages)
        request.pages, request.num_reserved = [], 0
        self._free_rows.append(request.row)
        request.row = None
        self.running.remove(request)

    def commit(self, plan: RoundPlan, requests: list[Request], result: RoundResult) -> list[tuple[Request, list[int]]]:
        """Advance counters by the round's result. Returns (request, tokens appended) per row that sampled.

        Rejected drafts need no undoing: `num_computed` does not count them.
        """
        outcomes = iter(result.rows)
        prompt_logprobs = iter(result.prompt_logprobs)
        yielded = []
        for request, work in zip(requests, plan.work, strict=True):
            if work.num_prompt_logprobs:  # a recomputed prompt's entries are replaced
                request.prompt_logprobs[work.computed :] = islice(prompt_logprobs, work.num_prompt_logprobs)
            request.num_computed += work.new
            if self._draft_kv:
                request.draft_lag += work.new - work.catch_up
            if not work.samples:
                continue
            outcome = next(outcomes)
            request.num_computed += outcome.accepted
            if self._draft_kv and work.gamma:  # if all drafts were accepted, the last one was never fed
                request.draft_lag = int(outcome.accepted == work.gamma)
            yielded.append((request, request.commit(outcome.tokens)))
            if request.finish_reason is not None:
                self._release_row(request)
                del self._by_id[request.id]
        self.controller.observe(plan, requests, result)
        return yielded
