"""One rank's share of the engine: its shard of the model, its pool, its rows; runs the rounds it is told to."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch
from torch import Tensor

from engine.batch.rows import Rows
from engine.batch.stopwatch import Stopwatch
from engine.config.deployment import EngineConfig
from engine.messages import PromptLogprobs, TokenLogprobs
from engine.oom import OutOfMemory, is_out_of_memory
from engine.plan import RowResult, RowWork, StepPlan, StepResult
from engine.ranks.protocol import WeightBytes
from engine.sampling.grammar import Grammars
from engine.sampling.sampler import Logprobs, PromptReport
from engine.speculation.drafters import TimedDrafter
from engine.speculation.round import run_round
from engine.speculation.verify import Verdict
from engine.worker.build import DraftModel, drafting_model, make_drafter, make_sampler, make_target
from engine.worker.worker import consistency
from kernels.transfer import fetch
from models.default import resolve_model
from models.llama import Llama
from parallel.group import Group, RoundGivenUp
from parallel.sampling import VocabShard

_NO_DRAFT_MODEL = DraftModel()

log = logging.getLogger(__name__)


def nothing() -> None:
    """What the host has to do while a device computes, where there is nothing else."""


class Worker:
    """Owns everything of one rank. `execute` is the only thing that moves it."""

    def __init__(
        self,
        model: Llama,
        config: EngineConfig,
        *,
        num_pages: int,
        max_model_len: int,
        group: Group,
        draft: DraftModel = _NO_DRAFT_MODEL,
    ) -> None:
        """draft: the draft model, if the config has one."""
        page_size = config.cache.page_size
        self._group = group
        self._groups = [group] if draft.group is None or draft.group is group else [group, draft.group]
        self._digest_every = config.digest_every if group.size > 1 else 0
        self._rows = Rows(
            max_rows=config.scheduler.max_rows,
            max_model_len=max_model_len,
            page_size=page_size,
            device=model.device,
            ops=model.ops,
        )
        self._model, self._own_draft = model, draft.model
        self._drafting = drafting_model(config, model, draft)
        vocab = VocabShard(model.vocab_start, model.vocab_size, model.config.vocab_size, group)
        eos = model.config.eos_token_ids
        tokenizer = resolve_model(config.model) / "tokenizer.json"
        self._grammars = Grammars(config.scheduler.max_rows, tokenizer, model.config.vocab_size, eos)
        self._sampler = make_sampler(config, self._rows, vocab, model.ops, self._grammars)
        target = make_target(config, model, self._rows, num_pages)
        self._target, drafter = make_drafter(config, target, self._rows, self._sampler, group, draft)
        self._watch = Stopwatch(model.device)
        self._drafter = TimedDrafter(drafter, self._watch)

    @property
    def weight_bytes(self) -> WeightBytes:
        """Of this rank's shards."""
        tables = self._model.table_bytes + (self._own_draft.table_bytes if self._own_draft else 0)
        return WeightBytes(self._model.matrix_bytes, self._drafting.matrix_bytes if self._drafting else 0, tables)

    @torch.inference_mode()
    def execute(self, plan: StepPlan, meanwhile: Callable[[], None] = nothing) -> StepResult:
        """Run one round. Its result is the only thing that crosses from device to host.

        meanwhile: called once all of the round is sent to the device, before its result is waited for.
        Raises OutOfMemory, on every rank, if memory did not suffice on one of them: nothing is left of the round then,
        and its rows have to start anew. A group that cannot give a round up raises what it comes to.
        """
        for group in self._groups:
            group.begin_round()
        result, reason = self._attempt(plan, meanwhile)
        if result is None:
            for group in self._groups:
                group.give_up()
        failed = self._group.agree(reason is not None)
        if not failed:
            assert result is not None  # who gives up has failed, or has seen one that has
            return result
        if reason is not None and self._group.rank > 0:  # rank 0 says it with the requests that fail
            log.error("out of memory: %s", reason)
        self._rows.forget(plan)
        self._sampler.give_up()
        self._watch.reset()
        raise OutOfMemory(_on_ranks(failed, reason) if self._group.size > 1 else reason)

    def _attempt(self, plan: StepPlan, meanwhile: Callable[[], None]) -> tuple[StepResult | None, str | None]:
        """The result, or how this rank ran out of memory; neither if another did. Lets go of the exception, and with it
        of what the failed calls held."""
        try:
            return self._run(plan, meanwhile), None
        except RoundGivenUp:
            return None, None
        except (RuntimeError, MemoryError) as error:
            if not (self._group.can_give_up and is_out_of_memory(error)):
                raise
            return None, str(error)

    def _run(self, plan: StepPlan, meanwhile: Callable[[], None]) -> StepResult:
        began = time.perf_counter()
        if plan.clear:
            self._target.pool.clear(plan.clear)
        for start in plan.starts:
            self._grammars.start(start)
            self._sampler.start(start)
        verdict = run_round(self._rows.enter(plan), self._target, self._drafter, self._sampler)
        decided = fetch(verdict.rows)  # the one copy of the round, but for log-probabilities
        meanwhile()
        results = _to_host(verdict, decided(), plan)
        for row, result in zip((work.row for work in plan.work if work.samples), results, strict=True):
            self._grammars.commit(row, result.tokens)
        draft_seconds = self._watch.take()
        prompts = _prompts_to_host(verdict.prompts) if verdict.prompts else []
        verify_seconds = time.perf_counter() - began - draft_seconds
        step = StepResult(plan.step, results, draft_seconds, verify_seconds, prompts)
        # Not part of what the round takes: neither a profile nor the controller is to see it.
        if self._digest_every and plan.step % self._digest_every == 0:
            consistency.compare(self._rows, self._group, plan.step)
        return step


def _on_ranks(ranks: list[int], reason: str | None) -> str:
    """reason: this rank's, if it is one of them."""
    where = f"on rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
    return where if reason is None else f"{where}: {reason}"


def _to_host(verdict: Verdict, rows: Tensor, plan: StepPlan) -> list[RowResult]:
    """rows: the verdict's, on the host."""
    sampling = [(work, row) for work, row in zip(plan.work, rows.tolist(), strict=True) if work.samples]
    logprobs = _logprobs_by_row(verdict.logprobs, [work for work, _ in sampling]) if verdict.logprobs else {}
    return [
        RowResult(drafted, count, tokens[: count + 1], logprobs[i][: count + 1] if i in logprobs else None)
        for i, (_, (drafted, count, *tokens)) in enumerate(sampling)
    ]


def _prompts_to_host(report: PromptReport) -> list[PromptLogprobs]:
    parts = (report.tokens, report.chosen, report.rank, report.top_ids, report.top)
    return [PromptLogprobs(*each) for each in zip(*(part.tolist() for part in parts), strict=True)]


def _logprobs_by_row(logprobs: Logprobs, sampling: list[RowWork]) -> dict[int, list[TokenLogprobs]]:
    """What each row that asks is told, keyed by its index among the rows that sample; drafts that failed included."""
    owner = [i for i, work in enumerate(sampling) for _ in range(work.gamma + 1)]
    reports: dict[int, list[TokenLogprobs]] = {}
    columns = zip(
        logprobs.decisions.tolist(),
        logprobs.chosen.tolist(),
        logprobs.top_ids.tolist(),
        logprobs.top.tolist(),
        strict=True,
    )
    for decision, chosen, top_ids, top in columns:
        reports.setdefault(owner[decision], []).append(TokenLogprobs(chosen, top_ids, top))
    return reports
