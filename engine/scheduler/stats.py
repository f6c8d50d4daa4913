"""Statistics of the engine's work, for /metrics and --stats."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import msgspec

from engine.messages import EngineStats
from engine.plan import NO_DRAFTS, DrafterName, DraftOrigin, RoundPlan, RoundResult, RowWork
from engine.scheduler.controller import DraftReads, shared_by_drafts
from engine.scheduler.request import Request


class StatsRecorder:
    """Recorder of running totals. Host-side, O(rows) per round."""

    def __init__(
        self,
        *,
        pages_total: int,
        page_size: int,
        bytes_per_token: int,
        gamma_max: int,
        draft_reads: Mapping[DrafterName | None, DraftReads],
        policy: str,
        draft_pages_per_row: int,
        target_tokens_read: Callable[[int, int, int], int] | None = None,
        target_kv: dict[str, str | int] | None = None,
        kv_format: str = "dense",
    ) -> None:
        """draft_reads: by RoundPlan.drafter. policy, draft_pages_per_row, target_kv, kv_format: see EngineStats.
        target_tokens_read: maps a row's prompt tokens, a position and a number of queries from it on to the KV slots
        that the target reads; None: all."""
        self._draft_reads = draft_reads
        self._target_tokens_read = target_tokens_read or (lambda num_prompt, first, queries: first + queries)
        self.totals = EngineStats(
            pages_total=pages_total,
            page_size=page_size,
            kv_token_bytes=bytes_per_token,
            policy=policy,
            draft_pages_per_row=draft_pages_per_row,
            target_kv=target_kv or {},
            kv_format=kv_format,
            accepted_per_position=[0] * gamma_max,
            gamma_chosen=[0] * (gamma_max + 1),
        )

    def record_plan(self, plan: RoundPlan, requests: Sequence[Request], shared_tokens: int = 0) -> None:
        """Count a round's rows. Call before the round is committed. shared_tokens: of its decoding rows
        (Controller.choose); they count once, for the row that reads them."""
        self.totals.rounds += 1
        decoding = []
        for request, work in zip(requests, plan.work, strict=True):
            if request.decoding:
                self._decode_row(request, work, plan)
                decoding.append(work)
        if shared_tokens:
            by_drafts = self._shared_by_drafts(decoding, plan, shared_tokens)
            self.totals.draft_kv_tokens_read -= by_drafts
            self.totals.kv_tokens_read -= shared_tokens + by_drafts

    def _shared_by_drafts(self, decoding: Sequence[RowWork], plan: RoundPlan, shared_tokens: int) -> int:
        """Estimate the shared tokens of all draft steps."""
        reads = self._draft_reads[plan.drafter]
        if not reads.share:
            return 0
        contexts = [work.computed + 1 for work in decoding]
        found = 0.0
        for step in range(max((work.model_drafts for work in decoding), default=0)):
            drafting = [work.computed + 1 for work in decoding if work.model_drafts > step]
            found += shared_by_drafts(shared_tokens, contexts, drafting, reads.tokens_read, plan.budget, step)
        return round(found)

    def _decode_row(self, request: Request, work: RowWork, plan: RoundPlan) -> None:
        totals, context = self.totals, work.computed + 1
        totals.gamma_chosen[work.gamma] += 1
        steps = range(len(work.proposed), work.gamma)
        reads = self._draft_reads[plan.drafter]
        by_drafts = sum(reads.tokens_read(context + step, plan.budget) for step in steps)
        by_target = self._target_tokens_read(request.num_prompt, work.computed, work.gamma + 1)
        totals.draft_kv_tokens_read += by_drafts
        totals.kv_tokens_read += by_target + by_drafts

    def record_row(
        self, request: Request, drafted: int, accepted: int, tokens: int, origin: DraftOrigin = NO_DRAFTS
    ) -> None:
        """Count a row's `tokens` output tokens, of which the first `accepted` were among its `drafted` ones. origin: of
        its drafts.

        Drafts after the token that ended a request were never verified: they count as drafted, but not as rejected.
        """
        totals = self.totals
        if request.num_output == tokens:
            totals.prompt_tokens += request.num_prompt
        totals.generated_tokens += tokens
        totals.accepted_tokens += accepted
        totals.drafts += drafted > 0
        totals.draft_tokens += drafted
        from_text = origin.from_text
        totals.text_draft_tokens += from_text
        totals.text_accepted_tokens += min(accepted, from_text)
        if origin.by_model:
            totals.model_draft_tokens += max(0, drafted - from_text)
            totals.model_accepted_tokens += max(0, accepted - from_text)
        totals.rejections += accepted < min(drafted, tokens)
        for position in range(accepted):
            totals.accepted_per_position[position] += 1

    def record_time(self, result: RoundResult, seconds: float) -> None:
        """Count a round's time. seconds: of the whole round, from scheduling to commit."""
        totals = self.totals
        totals.draft_seconds += result.draft_seconds
        totals.verify_seconds += result.verify_seconds
        totals.host_seconds += seconds - result.draft_seconds - result.verify_seconds


def acceptance_rate(stats: EngineStats) -> float:
    """Estimate alpha, the probability that the target agrees with one drafted token.

    A row's drafts are checked up to the first disagreement, so the estimate is accepted / (accepted + rejections),
    where a row has one rejection per round in which not all of its drafts were accepted. NaN if nothing was drafted.
    """
    tried = stats.accepted_tokens + stats.rejections
    return stats.accepted_tokens / tried if tried else float("nan")


_GAUGES = {
    "state",
    "running",
    "waiting",
    "pages_total",
    "pages_free",
    "pages_cached",
    "page_size",
    "kv_token_bytes",
    "sliding_pages_total",
    "sliding_pages_owned",
    "policy",
    "draft_pages_per_row",
    "target_kv",
    "kv_format",
    "weights",
}


def add_totals(stats: EngineStats, before: EngineStats) -> EngineStats:
    """Return a copy of `stats` whose totals include those of `before`, the engines that ran before this one."""

    def total(name: str) -> Any:
        mine, theirs = getattr(stats, name), getattr(before, name)
        if isinstance(mine, list):
            return [a + b for a, b in zip_longest(mine, theirs, fillvalue=0)]
        return mine + theirs

    totals = {name: total(name) for name in stats.__struct_fields__ if name not in _GAUGES}
    return msgspec.structs.replace(stats, **totals)
