"""Worker of one rank: owns its shard of the model, its pool and its rows, and runs rounds."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Self

import torch
from torch import Tensor

from engine.batch.round_batch import RoundBatch
from engine.batch.stopwatch import Stopwatch
from engine.config.deployment import EngineConfig
from engine.messages import PromptLogprobs, TokenLogprobs
from engine.oom import OutOfMemory, is_out_of_memory
from engine.plan import RoundPlan, RoundResult, RowFailure, RowResult, RowWork
from engine.ranks.protocol import WeightBytes
from engine.sampling.grammar import Grammars
from engine.sampling.sampler import NOT_FINITE, NOTHING_LEFT, LogprobTensors, PromptLogprobTensors
from engine.scheduler.sliding_pages import pool_pages
from engine.speculation.drafters import TimedDrafter
from engine.speculation.round import run_round
from engine.speculation.verify import Verdict
from engine.worker import consistency
from engine.worker.build import (
    DraftModel,
    load_draft,
    make_drafter,
    make_graphs,
    make_row_state,
    make_sampler,
    make_target,
    own_drafts,
)
from engine.worker.kv_memory import allocate, size_pool
from engine.worker.loading import load_shard
from engine.worker.resolve import Resolved
from engine.worker.weight_choice import describe_formats
from kernels.transfer import fetch
from models.decoder import DecoderModel
from models.default import resolve_model
from parallel.group import Group, RoundAbandoned
from parallel.vocab_shard import VocabShard

log = logging.getLogger(__name__)


_NOT_FINITE = (
    "the model computed a logit that is not a finite number",
    "the model computed a logit that is not a finite number, or another rank failed the request and logged why",
)


def noop() -> None:
    """Do nothing: the default for `meanwhile`."""


class Worker:
    """Owner of all state of one rank. Only `execute` changes it.

    model: this rank's shard of the target. draft: that of a draft model. num_pages: of the target's pool. pages: of the
    pool of each attention group (pool_pages). max_model_len: of a request.
    """

    @classmethod
    def load(
        cls,
        config: EngineConfig,
        resolved: Resolved,
        device: torch.device,
        group: Group,
        draft_group: Group | None,
        *,
        model: DecoderModel | None = None,
        progress: bool = False,
    ) -> Self:
        """Load this rank's shards, size its pool and build it. All ranks do so together.

        device: this rank's. draft_group: the ranks that share the draft model, if this is one of them. model: a loaded
        shard. progress: show a bar on stderr. Raises ConfigError, ModelError.
        """
        is_shared = model is not None
        if model is None:
            model = load_shard(config, resolved, device, group, progress=progress)
        model = model.keeping_all_kv(resolved.shape.keeps_all_kv)
        draft = load_draft(config, model, resolved.max_model_len, draft_group)
        for each in dict.fromkeys((group, draft_group or group)):
            each.settle()  # loading takes some ranks longer than a round may
        resolved = size_pool(config, resolved, model, group, draft=draft.model)
        assert resolved.num_pages is not None
        length = resolved.max_model_len
        if is_shared:
            model = model.with_positions(length)
        else:
            model.limit_positions(length)  # it is loaded before the devices' memory decides on the length
        if draft.model is not None:
            draft.model.limit_positions(length)
        return cls(model, config, num_pages=resolved.num_pages, max_model_len=length, group=group, draft=draft)

    def __init__(
        self,
        model: DecoderModel,
        config: EngineConfig,
        *,
        num_pages: int,
        max_model_len: int,
        group: Group,
        draft: DraftModel,
    ) -> None:
        """Use `load`."""
        self.model, self.draft, self.num_pages, self.max_model_len = model, draft, num_pages, max_model_len
        self.pages = pool_pages(config, model.config, num_pages, max_model_len)
        self._group = group
        self._groups = [group] if draft.group is None or draft.group is group else [group, draft.group]
        self._digest_every = config.digest_every if group.size > 1 else 0
        self._state = make_row_state(config, model, num_pages, max_model_len)
        self._own_drafts = own_drafts(config, model)
        drafting = [draft.model] if draft.model is not None else []
        drafting += [self._own_drafts or model] if "self" in config.by_drafter else []
        self.weight_formats = describe_formats(model, drafting)  # of this rank
        vocab = VocabShard(model.vocab_start, model.vocab_size, model.config.vocab_size, group)
        eos = model.config.eos_token_ids
        tokenizer = resolve_model(config.model) / "tokenizer.json"
        self._failures = self._state.failures
        self._grammars = Grammars(self._state, tokenizer, model.config.vocab_size, eos)
        self._sampler = make_sampler(config, self._state, vocab, model.ops, self._grammars)
        self._graphs = make_graphs(config, model)
        try:
            # Making the drafter takes collectives, in which no rank must wait for one that is out of memory.
            target = allocate(group, model.device, lambda: make_target(config, model, self._state, *self.pages))
            self._target, drafter = make_drafter(config, target, self._state, self._sampler, group, draft, self._graphs)
        except BaseException:
            self.close()
            raise
        self._watch = Stopwatch(model.device)
        self._drafter = TimedDrafter(drafter, self._watch)

    def close(self) -> None:
        """Destroy what must not outlive the groups: the captured forwards. No round can run afterwards."""
        if self._graphs is not None:
            self._graphs.release()

    @property
    def weight_bytes(self) -> WeightBytes:
        """Bytes of this rank's shards."""
        tables = self.model.table_bytes + (self.draft.model.table_bytes if self.draft.model else 0)
        draft, own = (each.matrix_bytes if each is not None else 0 for each in (self.draft.model, self._own_drafts))
        return WeightBytes(self.model.matrix_bytes, draft, tables, own)

    @property
    def no_grammars(self) -> str | None:
        """Why output cannot be constrained by a grammar; None if it can be."""
        return self._grammars.unavailable

    def count_allowed(self, row: int, tokens: Sequence[int]) -> int:
        """Count the leading ones of `tokens` that the row's grammar allows next."""
        return self._grammars.count_allowed(row, tokens)

    @torch.inference_mode()
    def execute(self, plan: RoundPlan, meanwhile: Callable[[], None] = noop) -> RoundResult:
        """Run one round. Only its result is copied from device to host.

        meanwhile: called when the whole round has been sent to the device, before the host waits for its result.
        Raises OutOfMemory, on every rank, if memory did not suffice on one of them. In a group that cannot abandon a
        round, that rank's own error is raised instead. After any error nothing remains of the round, and its rows must
        start anew.
        """
        try:
            return self._execute(plan, meanwhile)
        except BaseException:
            with contextlib.suppress(RuntimeError):  # a device that has failed would hide the first error
                self._state.reset_rows(plan)
            self._sampler.abandon_round()
            self._watch.reset()
            raise

    def _execute(self, plan: RoundPlan, meanwhile: Callable[[], None]) -> RoundResult:
        for group in self._groups:
            group.begin_round()
        result, reason = self._attempt(plan, meanwhile)
        if result is None:
            for group in self._groups:
                group.abandon()
        failed = self._group.agree(reason is not None)
        if not failed:
            assert result is not None  # a rank without a result has failed, or found that another one has
            return result
        if reason is not None and self._group.rank > 0:  # rank 0 logs it with the requests that fail
            log.error("out of memory: %s", reason)
        raise OutOfMemory(_on_ranks(failed, reason) if self._group.size > 1 else reason)

    def _attempt(self, plan: RoundPlan, meanwhile: Callable[[], None]) -> tuple[RoundResult | None, str | None]:
        """Run and return the result, or describe how this rank ran out of memory; neither if another rank did. Drops
        the exception, and with it the memory that the failed calls held."""
        try:
            return self._run(plan, meanwhile), None
        except RoundAbandoned:
            return None, None
        except (RuntimeError, MemoryError) as error:
            if not (self._group.can_abandon and is_out_of_memory(error)):
                raise
            return None, str(error)

    def _run(self, plan: RoundPlan, meanwhile: Callable[[], None]) -> RoundResult:
        hashes = self._hash_pages(plan)
        began = time.perf_counter()
        if plan.clear:
            self._target.pool.clear(plan.clear)
            if (sliding := self._target.sliding) is not None:
                sliding.pool.clear([page for page in plan.clear if page < sliding.pool.num_pages])
        for start in plan.starts:
            self._failures.start(start.row)
            self._sampler.start(start)
            self._grammars.start(start)
            with self._failures.guard(start.row, "its drafter"):
                self._drafter.start(start)
        self._state.apply(plan)
        verdict = run_round(RoundBatch(self._state, plan), self._target, self._drafter, self._sampler)
        wait_for_rows = fetch(verdict.rows)  # the only copy of a round without log-probabilities
        meanwhile()
        results = _row_results(verdict, wait_for_rows(), plan)
        prompt_logprobs = _prompt_logprobs(verdict.prompt_logprobs) if verdict.prompt_logprobs else []
        failures = self._collect_failures(plan, results, prompt_logprobs)
        for row, each in zip((work.row for work in plan.work if work.samples), results, strict=True):
            self._grammars.commit(row, each.tokens)
        draft_seconds = self._watch.take()
        verify_seconds = time.perf_counter() - began - draft_seconds
        result = RoundResult(plan.number, results, draft_seconds, verify_seconds, prompt_logprobs, failures, hashes)
        # Not counted in the round's time, which the profile and the controller use.
        if self._digest_every and plan.number % self._digest_every == 0:
            consistency.compare(self._state, self._group, plan.number)
        return result

    def _hash_pages(self, plan: RoundPlan) -> list[int]:
        """Hash the pages that the plan audits."""
        hashes = consistency.hash_pages(self._target.pool, plan.audit, self._group) if plan.audit else []
        if plan.sliding_audit:
            assert self._target.sliding is not None
            hashes += consistency.hash_pages(self._target.sliding.pool, plan.sliding_audit, self._group)
        return hashes

    def _collect_failures(
        self, plan: RoundPlan, results: list[RowResult], prompt_logprobs: list[PromptLogprobs]
    ) -> list[RowFailure]:
        """List the rows that failed in this round or before, and remove the marks of failure from their tokens.

        Every rank finds the same marks; rows that do not sample, and reasons, are those of this rank.
        """
        failures, sampled, scored = [], iter(results), iter(prompt_logprobs)
        for work in plan.work:
            mark = 0
            if work.samples and (tokens := next(sampled).tokens)[-1] < 0:
                mark = tokens.pop()
            own = list(islice(scored, work.num_prompt_logprobs))
            if any(math.isnan(each.logprob) for each in own):
                mark = mark or NOT_FINITE
            if mark == NOTHING_LEFT:
                failures.append(RowFailure(work.row, self._sampler.why_excluded(work.row), True))
            elif cause := self._failures.cause(work.row):
                failures.append(RowFailure(work.row, *cause))
            elif mark:
                failures.append(RowFailure(work.row, _NOT_FINITE[self._group.size > 1], False))
        return failures


def _on_ranks(ranks: list[int], reason: str | None) -> str:
    """Describe where memory ran out. reason: this rank's, if it is one of `ranks`."""
    where = f"on rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
    return where if reason is None else f"{where}: {reason}"


def _row_results(verdict: Verdict, rows: Tensor, plan: RoundPlan) -> list[RowResult]:
    """Build the results of the rows that sample. rows: the verdict's, on the host."""
    sampling = [(work, row) for work, row in zip(plan.work, rows.tolist(), strict=True) if work.samples]
    logprobs = _logprobs_by_row(verdict.logprobs, [work for work, _ in sampling]) if verdict.logprobs else {}
    return [
        RowResult(drafted, count, tokens[: count + 1], logprobs[i][: count + 1] if i in logprobs else None)
        for i, (_, (drafted, count, *tokens)) in enumerate(sampling)
    ]


def _prompt_logprobs(tensors: PromptLogprobTensors) -> list[PromptLogprobs]:
    parts = (tensors.tokens, tensors.chosen, tensors.rank, tensors.top_ids, tensors.top)
    return [PromptLogprobs(*each) for each in zip(*(part.tolist() for part in parts), strict=True)]


def _logprobs_by_row(logprobs: LogprobTensors, sampling: list[RowWork]) -> dict[int, list[TokenLogprobs]]:
    """Return the log-probabilities of each row that requests them, keyed by its index among the rows that sample,
    including those after a rejected draft."""
    owner = [i for i, work in enumerate(sampling) for _ in range(work.gamma + 1)]
    by_row: dict[int, list[TokenLogprobs]] = {}
    columns = zip(
        logprobs.index.tolist(),
        logprobs.chosen.tolist(),
        logprobs.top_ids.tolist(),
        logprobs.top.tolist(),
        strict=True,
    )
    for sample, chosen, top_ids, top in columns:
        by_row.setdefault(owner[sample], []).append(TokenLogprobs(chosen, top_ids, top))
    return by_row
