"""One rank's share of the engine: its shard of the model, its pool, its rows; runs the rounds it is told to."""

from __future__ import annotations

import time

import torch

from engine.config import EngineConfig, SpeculationConfig
from engine.messages import TokenLogprobs
from engine.plan import RowResult, RowWork, StepPlan, StepResult
from engine.rows import Rows
from engine.runner import Runner
from engine.sampling import Logprobs, Sampler
from engine.speculation.drafters import Drafter, NoDrafter, SelfDrafter, TimedDrafter
from engine.speculation.policies import Dense, make_policy
from engine.speculation.round import run_round
from engine.speculation.verify import Verdict
from engine.stopwatch import Stopwatch
from kernels.attention.reference import ReferenceAttention
from kernels.kv_cache import KVPool
from models.llama import Llama
from parallel.group import Group
from parallel.sampling import VocabShard


class Worker:
    """Owns everything of one rank. `execute` is the only thing that moves it."""

    def __init__(self, model: Llama, config: EngineConfig, *, num_pages: int, max_model_len: int, group: Group) -> None:
        page_size = config.cache.page_size
        self._rows = Rows(
            max_rows=config.scheduler.max_rows,
            max_model_len=max_model_len,
            page_size=page_size,
            device=model.device,
        )
        vocab = VocabShard(model.vocab_start, model.vocab_size, model.config.vocab_size, group)
        self._sampler = Sampler(self._rows, vocab)
        pool = KVPool(
            num_layers=model.num_layers,
            num_pages=num_pages,
            page_size=page_size,
            kv_heads=model.kv_heads,
            head_dim=model.head_dim,
            dtype=model.dtype,
            device=model.device,
        )
        self._target = Runner(model, pool, ReferenceAttention(page_size), Dense(page_size))
        self._watch = Stopwatch(model.device)
        self._drafter = TimedDrafter(self._make_drafter(config.speculation, page_size), self._watch)

    def _make_drafter(self, config: SpeculationConfig, page_size: int) -> Drafter:
        if config.gamma == 0:
            return NoDrafter()
        policy, attention = make_policy(config.kv, page_size), ReferenceAttention(page_size)
        return SelfDrafter(Runner(self._target.model, self._target.pool, attention, policy), self._sampler)

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Run one round. Its result is the only thing that crosses from device to host."""
        began = time.perf_counter()
        for start in plan.starts:
            self._sampler.start(start)
        verdict = run_round(self._rows.enter(plan), self._target, self._drafter, self._sampler)
        results = _to_host(verdict, plan)
        draft_seconds = self._watch.take()
        return StepResult(plan.step, results, draft_seconds, time.perf_counter() - began - draft_seconds)


def _to_host(verdict: Verdict, plan: StepPlan) -> list[RowResult]:
    counts = torch.stack([verdict.drafted, verdict.accepted], 1)
    decided = torch.cat([counts, verdict.tokens], 1).tolist()  # the one copy of the round, but for log-probabilities
    sampling = [work for work in plan.work if work.samples]
    logprobs = _logprobs_by_row(verdict.logprobs, sampling) if verdict.logprobs else {}
    return [
        RowResult(drafted, count, tokens[: count + 1], logprobs[i][: count + 1] if i in logprobs else None)
        for i, (drafted, count, *tokens) in enumerate(decided)
    ]


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
