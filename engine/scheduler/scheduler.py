"""Scheduler: admission, the token limit of a round, page reservations, preemption, and the counters after a round."""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Iterable
from itertools import count, islice
from typing import NamedTuple

from engine.messages import AddRequest
from engine.ngram.ngram_drafts import NO_PROPOSAL
from engine.plan import DraftOrigin, PageDelta, RoundPlan, RoundResult, RowFailure, RowResult, RowStart, RowWork
from engine.scheduler.controller import Controller
from engine.scheduler.kv_audit import KVAudit
from engine.scheduler.kv_manager import KVManager
from engine.scheduler.prefill import PrefillNeed, find_waits, share_prefill
from engine.scheduler.request import Request
from engine.scheduler.request_ngrams import RequestNgrams
from engine.scheduler.validation import QueueFull, RequestError
from kernels.kv.kv_bits import KV_BITS, KVBits

_DENSE = KV_BITS["dense"]
_MAX_PROMPT_LOGPROBS = 256
"""Maximum tokens of a chunk that needs prompt logprobs: each takes logits of the whole vocabulary."""


class Committed(NamedTuple):
    """Outcome of a round for one request. tokens: those appended to it. row: None if it sampled none. failure: why it
    has failed; its tokens are valid. origin: of its drafts."""

    request: Request
    tokens: list[int]
    row: RowResult | None
    failure: RowFailure | None
    origin: DraftOrigin


class Scheduler:
    """Planner of rounds, one at a time.

    Invariant between rounds: every running row owns pages for all its computed tokens, and a decoding row has exactly
    its pending token uncomputed.

    Decode rows come first, each with its drafts. The tokens left in the round are shared by prefills, running and
    waiting ones (engine.scheduler.prefill). A request is admitted when pages for all its tokens are available, so that
    a prefill in progress never waits for pages. When a decoding row needs a page and none is available, drafts are
    dropped first; then the least urgent request is preempted. It gives its pages back and returns to the queue, to
    recompute what KV the prefix cache has lost by then. Requests are urgent by priority, then by arrival; a waiting one
    never preempts a running one.
    """

    def __init__(
        self,
        *,
        kv: KVManager,
        page_size: int,
        max_rows: int,
        max_batch_tokens: int,
        max_waiting: int,
        max_model_len: int,
        eos_token_ids: Iterable[int],
        controller: Controller,
        draft_kv: bool = False,
        kv_bits: KVBits = _DENSE,
        audit: KVAudit | None = None,
        ngrams: RequestNgrams | None = None,
    ) -> None:
        """draft_kv: whether drafts read KV of their own, which must be computed for a row's tokens before it drafts.
        kv_bits: of the target's KV. audit: checks the KV of cached pages. ngrams: finds drafts in the rows' text.
        """
        self._kv = kv
        self._page_size = page_size
        self._max_batch_tokens = max_batch_tokens
        self._max_requests = max_rows + max_waiting
        self._max_model_len = max_model_len
        self._eos = tuple(eos_token_ids)
        self.controller = controller
        self._draft_kv = draft_kv
        self._kv_bits = kv_bits
        self._audit = audit
        self._ngrams = ngrams
        self._free_rows = list(range(max_rows - 1, -1, -1))
        self._by_id: dict[str, Request] = {}
        self.waiting: list[Request] = []  # most urgent first
        self.running: list[Request] = []  # in order of admission
        self.preemptions = 0
        self.shared_tokens = 0  # of the decoding rows of the last plan, see Controller.choose
        self._adopted: list[PageDelta] = []  # by running rows, since the last plan that they were in
        self._round = 0
        self._numbers = count()

    # -- requests --------------------------------------------------------------------------------------------------

    def add(self, message: AddRequest) -> None:
        """Queue a request that passed `check_request`. Raises RequestError if its id is in use, QueueFull."""
        if message.id in self._by_id:
            raise RequestError(f"request id {message.id!r} is in use")
        if len(self._by_id) >= self._max_requests:
            raise QueueFull(f"{len(self._by_id)} requests are running or waiting already")
        request = Request(message, self._eos, next(self._numbers), self._kv_bits)
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
        """Raise PageLeak unless every page is accounted for, owned ones by running requests."""
        self._kv.check(self._by_id.values())

    def reset_prefix_cache(self) -> None:
        """Forget all KV that later requests could find. Running ones keep what they own."""
        self._kv.reset(self._by_id.values())

    # -- one round -------------------------------------------------------------------------------------------------

    def schedule(self) -> tuple[RoundPlan, list[Request]]:
        """Plan the next round. Returns the plan and the requests of its `work`, in the same order."""
        self._round += 1
        self.controller.begin_round()
        plan = RoundPlan(self._round, [], [], [])
        if self._audit is not None:
            plan.audit, plan.sliding_audit = self._audit.next_pages()
        work: list[tuple[Request, RowWork]] = []
        tokens_left = self._max_batch_tokens
        tokens_left -= self._plan_decodes(plan, work, tokens_left)
        self._plan_prefills(plan, work, tokens_left)
        work.sort(key=lambda item: -item[1].model_drafts)
        plan.work = [item for _, item in work]
        if self._adopted:
            rows = {item.row for item in plan.work}
            plan.pages += [delta for delta in self._adopted if delta.row in rows]
            self._adopted = [delta for delta in self._adopted if delta.row not in rows]
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
        self.shared_tokens = 0
        if not rows:
            return 0
        spare = tokens_left - len(rows)  # each row has one token; drafts share the rest evenly
        if len(rows) < len(self.running) or (self.waiting and self._free_rows):
            spare //= 2  # half of it is for prefills, which a full batch could block forever
        share = spare // len(rows)
        planned, catch_up_left = 0, self._max_batch_tokens
        self.shared_tokens = self._kv.shared_tokens
        ngrams = self._ngrams if self.controller.takes_text else None
        proposals = [NO_PROPOSAL] * len(rows) if ngrams is None else ngrams.propose(rows, share)
        choices = self.controller.choose(rows, self.shared_tokens, proposals, share)
        plan.budget, plan.drafter = self.controller.way
        by_model = self._by_model(plan)
        for request, proposal, choice in zip(rows, proposals, choices, strict=True):
            proposed = proposal.tokens[: choice.proposed]
            if ngrams is not None:
                ngrams.record(request, proposal, bool(proposed))
            gamma = max(0, min(len(proposed) + choice.model, share, request.max_draft_tokens))
            catch_up = 0
            if gamma > len(proposed) and by_model and request.needs_catch_up:
                catch_up = min(request.draft_lag, catch_up_left)
                catch_up_left -= catch_up
                gamma = gamma if catch_up == request.draft_lag else len(proposed)
            if not self._reserve(plan, request, request.num_tokens + gamma):
                gamma = min(gamma, request.num_reserved - request.num_tokens)
            assert request.row is not None
            planned += 1 + gamma
            self._cover(plan, request, request.num_tokens + gamma)
            row_work = RowWork(
                request.row,
                request.num_computed,
                1,
                gamma,
                True,
                catch_up,
                draft_lag=request.draft_lag if by_model else 0,
                proposed=proposed[:gamma],
                latest=choice.latest,
            )
            work.append((request, row_work))
        return planned

    def _plan_prefills(self, plan: RoundPlan, work: list[tuple[Request, RowWork]], tokens_left: int) -> None:
        """Plan prefill chunks of running and waiting requests. A waiting one that gets tokens is admitted."""
        if tokens_left <= 0:
            return
        for request, new in self._share_prefill(tokens_left):
            if request.row is None:
                if self._kv.num_needed(request) > self._kv.available:
                    continue  # a row before it has evicted the window of pages that it was to share
                self._admit(plan, request)
            logprobs = 0
            if request.params.prompt_logprobs is not None:
                logprobs = max(0, min(new, request.num_prompt - 1 - request.num_computed))
            assert request.row is not None
            self._cover(plan, request, request.num_computed + new)
            samples = new == request.num_uncomputed and request.params.max_tokens > 0
            row_work = RowWork(request.row, request.num_computed, new, 0, samples, num_prompt_logprobs=logprobs)
            work.append((request, row_work))

    def _share_prefill(self, tokens: int) -> list[tuple[Request, int]]:
        """Share tokens among the requests that need prefill, running and admissible ones. Returns those that get some,
        and how many. One that waits for another's pages gets none, and keeps its claim to a row and pages."""
        requests = [request for request in self.running if not request.decoding] + self._find_admissible()
        requests.sort(key=_urgency)
        shares = share_prefill([self._prefill_need(request) for request in requests], tokens)
        if waits := find_waits(requests, shares, self._page_size):
            requests = [request for request in requests if request not in waits]
            shares = share_prefill([self._prefill_need(request) for request in requests], tokens)
        return [(request, share) for request, share in zip(requests, shares, strict=True) if share]

    def _prefill_need(self, request: Request) -> PrefillNeed:
        """Describe the tokens that a request computes from now on, once admitted if it waits."""
        remaining = request.num_uncomputed
        if request.row is None:
            remaining -= len(self._kv.match(request)) * self._page_size
        limit = remaining if request.params.prompt_logprobs is None else min(remaining, _MAX_PROMPT_LOGPROBS)
        return PrefillNeed(request.priority, remaining, limit)

    def _find_admissible(self) -> list[Request]:
        """Find the waiting requests that could be admitted together, most urgent first, while rows and pages last."""
        found: list[Request] = []
        available, growing = self._kv.available, sum(request.may_grow for request in self.running)
        waiting = self.waiting[: len(self._free_rows)]
        for request in waiting[: self._kv.num_fitting(waiting)]:
            needed = self._kv.num_needed(request)
            # A page stays available for each running row that may need one more, so that an admission does not cause a
            # preemption in the next round.
            if needed + growing > available:
                break
            found.append(request)
            tokens = -(-request.num_tokens // self._page_size) * self._page_size
            available, growing = available - needed, growing + (tokens < request.most_tokens)
        return found

    def _admit(self, plan: RoundPlan, request: Request) -> None:
        """Give a waiting request a row, and pages for all of its tokens, which are available."""
        self.waiting.remove(request)
        request.row = self._free_rows.pop()
        self._kv.admit(request)
        if not self._draft_kv:
            request.draft_lag = 0
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
            )
        )
        plan.pages.append(PageDelta(request.row, 0, request.pages[:]))
        if request.sliding_pages:
            plan.pages.append(PageDelta(request.row, request.sliding_first, request.sliding_pages[:], sliding=True))

    def _reserve(self, plan: RoundPlan, request: Request, slots: int) -> bool:
        """Reserve pages for `slots` KV slots in total; False, and nothing changes, if too few are available."""
        if slots <= request.num_reserved:
            return True
        first = len(request.pages)
        pages = self._kv.allocate(request, slots)
        if pages is None:
            return False
        assert request.row is not None
        plan.pages.append(PageDelta(request.row, first, pages))
        return True

    def _cover(self, plan: RoundPlan, request: Request, end: int) -> None:
        """Give a row the sliding pages of positions up to end - 1, the last one that the round computes."""
        assert request.row is not None
        first, pages = self._kv.cover(request, end)
        if pages:
            plan.pages.append(PageDelta(request.row, first, pages, sliding=True))

    def _reserve_or_preempt(self, plan: RoundPlan, request: Request, slots: int) -> bool:
        """Reserve, preempting the least urgent requests; False if `request` itself was preempted."""
        while not self._reserve(plan, request, slots):
            if self._kv.release_spare(self.running):
                continue
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

    def restart_all(self) -> None:
        """Preempt all running requests and forget all KV, which other weights have computed. Tokens stay."""
        self.preemptions += len(self.running)
        self.restart_rows(self.running[:])
        self.reset_prefix_cache()
        if self._audit is not None:
            self._audit.forget()

    def _by_model(self, plan: RoundPlan) -> bool:
        """Whether a draft model makes the round's drafts, else the target itself."""
        return self._draft_kv and plan.drafter != "self"

    def _requeue(self, request: Request) -> None:
        self._release_row(request)
        request.num_computed = request.draft_lag = 0
        insort(self.waiting, request, key=_urgency)

    def _release_row(self, request: Request) -> None:
        """Free the request's row, and give back its pages."""
        assert request.row is not None
        self._adopted = [delta for delta in self._adopted if delta.row != request.row]
        self._kv.release(request)
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
        committed, by_model = [], self._by_model(plan)
        for request, work in zip(requests, plan.work, strict=True):
            if work.num_prompt_logprobs:  # a recomputed prompt's entries are replaced
                request.prompt_logprobs[work.computed :] = islice(prompt_logprobs, work.num_prompt_logprobs)
            request.num_computed += work.new
            outcome, tokens = None, []
            if work.samples:
                outcome = next(outcomes)
                request.num_computed += outcome.accepted
                tokens = request.commit(outcome.tokens)
            if self._draft_kv:
                request.count_lag(work, outcome.accepted if outcome else 0, by_model)
            failure = failures.get(work.row) if request.finish_reason is None else None
            if failure is not None and not failure.is_request_fault:
                self._kv.distrust(request, self.running)
            if failure is None:
                request.finish_if_scored()
                adopted = self._kv.commit(request)
                self._adopted += [PageDelta(work.row, place, [page]) for place, page in adopted.pages]
                self._adopted += [PageDelta(work.row, place, [page], sliding=True) for place, page in adopted.sliding]
            if request.finish_reason is not None or failure is not None:
                self._release_row(request)
                del self._by_id[request.id]
            if outcome is not None or failure is not None or request.finish_reason is not None:
                origin = DraftOrigin(len(work.proposed), by_model)
                committed.append(Committed(request, tokens, outcome, failure, origin))
        if self._audit is not None:
            self._audit.compare(result.audit)
        self.controller.observe(plan, requests, result)
        return committed


def _urgency(request: Request) -> tuple[int, int]:
    """Sort key: the most urgent request first."""
    return request.priority, request.number
