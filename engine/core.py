"""The engine: scheduler and ranks, one round at a time. Knows tokens, not text."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections.abc import Callable, Iterable

import msgspec
import torch

from engine.config.deployment import EngineConfig
from engine.control.auto import AutoGamma
from engine.control.step_times import StepTimes
from engine.kv.draft_spec import footprint
from engine.kv.policies import budget_policies
from engine.messages import (
    FINISH_ABORT,
    RETRY_MEMORY,
    AddRequest,
    EngineStats,
    Ready,
    RequestOutput,
)
from engine.oom import OutOfMemory
from engine.plan import StepPlan, StepResult
from engine.ranks.executor import Ranks
from engine.scheduler.controller import Controller, FixedGamma
from engine.scheduler.outputs import output_of
from engine.scheduler.pages import PageAllocator
from engine.scheduler.request import Request
from engine.scheduler.scheduler import RequestError, Scheduler
from engine.scheduler.stats import Accounts
from engine.worker.build import load_draft
from engine.worker.kv_memory import fit_pages
from engine.worker.loading import load_shard
from engine.worker.profiler import Profiler, keep, profile, profile_key, recall
from engine.worker.resolve import draft_reads, size_up
from engine.worker.worker import Worker, nothing
from models.llama import Llama
from parallel.group import Group

log = logging.getLogger(__name__)


class Engine:
    """Queues requests and runs them round by round. Not thread-safe: one loop owns it."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        model: Llama | None = None,
        controller: Controller | None = None,
        ranks: Callable[[EngineConfig, torch.device], Ranks] = Ranks.launch,
        progress: bool = True,
    ) -> None:
        """Load the model and reserve its memory, on all ranks.

        model: an already loaded one, in place of `config.model`'s weights (rank 0's shard of it, with several ranks).
        controller: in place of the one that the config describes. ranks: starts the other ranks, if there are any,
        given the config with every setting resolved. progress: a bar on stderr while loading.
        Raises ValueError (ConfigError, ModelError) for settings or files that cannot be served, RankFailure.
        """
        sizes = size_up(config, model)
        size = config.tensor_parallel_size
        self._config, self._sizes = config, sizes
        self._threads_before = torch.get_num_threads()
        if sizes.device.type == "cpu":
            torch.set_num_threads(sizes.threads)
        self._ranks: Ranks | None = None
        group = Group.single()
        try:
            if size > 1:
                self._ranks = ranks(sizes.settle(config), sizes.device)
                group = self._ranks.group
            if model is None:
                model = load_shard(config, sizes, sizes.device, group, progress=progress)
            draft = load_draft(config, model, sizes.max_model_len, self._draft_group(group))
            num_pages = fit_pages(config, sizes, model, group)
            self._worker = Worker(
                model,
                config,
                num_pages=num_pages,
                max_model_len=sizes.max_model_len,
                group=group,
                draft=draft,
            )
            if self._ranks:
                self._ranks.wait_ready(config.start_timeout_s)
            self.profiler = Profiler(self._run, config, num_pages, sizes.max_model_len)
            if controller is None:
                controller = self.make_controller()
        except BaseException:
            self.close()
            raise
        self.overlaps = sizes.device.type != "cpu"  # the host is free while a round is under way
        self._under_way = False
        self._leaving: list[str] = []  # requests aborted meanwhile
        self._pages = PageAllocator(num_pages)
        self._scheduler = Scheduler(
            pages=self._pages,
            page_size=config.cache.page_size,
            max_rows=config.scheduler.max_rows,
            max_batch_tokens=config.scheduler.max_batch_tokens,
            max_waiting=config.scheduler.max_waiting,
            max_model_len=sizes.max_model_len,
            eos_token_ids=model.config.eos_token_ids,
            controller=controller,
            draft_kv=config.speculation.draft_model is not None,
            own_tokens=config.speculation.own_tokens,
        )
        self.weight_bytes = self._worker.weight_bytes
        if self._ranks:
            self.weight_bytes += self._ranks.weight_bytes
        self._accounts = Accounts(
            pages_total=num_pages,
            page_size=config.cache.page_size,
            bytes_per_token=sizes.kv_token_bytes,
            gamma_max=controller.gamma_max,
            draft_reads=draft_reads(config) if controller.gamma_max else lambda context, budget: 0,
            policy=config.speculation.kv.policy if config.speculation.most_drafts else "",
            draft_pages_per_row=footprint(config.speculation, config.cache.page_size).pages,
        )
        self.ready = Ready(
            model=sizes.path.name,
            max_model_len=sizes.max_model_len,
            vocab_size=model.config.vocab_size,
            eos_token_ids=list(model.config.eos_token_ids),
            stats=self.stats(),
        )
        kv_gb = num_pages * config.cache.page_size * sizes.kv_token_bytes / 1e9
        where = f"{size} × {sizes.device.type}" if size > 1 else str(sizes.device)
        log.info(
            "%s in %s on %s, kernels %s, KV pool of %d pages (%.2f GB)",
            sizes.path.name,
            str(sizes.dtype).removeprefix("torch."),
            where,
            sizes.ops.name,
            num_pages,
            kv_gb,
        )

    def check(self, request: AddRequest) -> None:
        """Raise RequestError for a request that can never run."""
        vocab_size = self.ready.vocab_size
        params = request.params
        for what, ids in (
            ("prompt", request.prompt),
            ("logit_bias", params.logit_bias),
            ("stop_token_ids", params.stop_token_ids),
            ("allowed_token_ids", params.allowed_token_ids),
            ("bad_words", [token for word in params.bad_words for token in word]),
        ):
            # A prompt can have 100,000 tokens, and running rows wait for this.
            if ids and (min(ids) < 0 or max(ids) >= vocab_size):
                token = next(token for token in ids if not 0 <= token < vocab_size)
                raise RequestError(f"{what}: token id {token} is not in the vocabulary of {vocab_size}")
        if params.grammar is not None and not (self._sizes.path / "tokenizer.json").is_file():
            raise RequestError("grammar: the model's tokenizer.json is not there")
        self._scheduler.check_request(request)

    def add(self, request: AddRequest) -> None:
        """Queue a request. Raises RequestError for one that can never run, QueueFull when too many are here."""
        self.check(request)
        self._scheduler.add(request)

    def abort(self, ids: Iterable[str]) -> None:
        """Forget requests; their pages are free at once, or when the round under way is over. Unknown ids are fine."""
        if self._under_way:
            self._leaving += ids
            return
        for request_id in ids:
            self._scheduler.abort(request_id)
        self._check_if_idle()

    def has_work(self) -> bool:
        return self._scheduler.has_work

    def step(self, meanwhile: Callable[[], None] = nothing) -> list[RequestOutput]:
        """Run one round; nothing is run when there is no work. Returns what it yielded, one per row that sampled.

        meanwhile: what else there is to do for the host; called, perhaps again, while a device is busy with the round.
        Requests of a round that memory does not suffice for, on any rank, end with an error. Raises RankFailure, also
        for that where ranks cannot give a round up (Group.can_give_up).
        """
        if not self._scheduler.has_work:
            return []
        began = time.perf_counter()
        plan, requests = self._scheduler.schedule()
        self._under_way = True
        try:
            # A grammar has to see the drafts before the round is all sent.
            if any(request.params.grammar is not None for request in requests):
                meanwhile()
            result = self._run(plan, meanwhile)
        except OutOfMemory as error:
            meanwhile()  # which the round may not have come to
            outputs = self._give_up(requests, error)
        else:
            outputs = self._commit(plan, requests, result)
            self._accounts.took(result, time.perf_counter() - began)
        finally:
            self._under_way = False
        leaving, self._leaving = self._leaving, []
        self.abort(leaving)  # which looks whether the engine is idle, too
        if self._config.check_invariants:
            self._scheduler.check()
        return outputs

    def stats(self) -> EngineStats:
        """A copy of the counters as they stand."""
        totals, report = self._accounts.totals, self._scheduler.controller.report
        return msgspec.structs.replace(
            totals,
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            pages_free=self._pages.free,
            preemptions=self._scheduler.preemptions,
            decode_seconds=report.decode_seconds,
            plain_seconds=report.plain_seconds,
            forecast_seconds=report.forecast_seconds,
            alpha=report.alpha,
            accepted_per_position=totals.accepted_per_position[:],
            gamma_chosen=totals.gamma_chosen[:],
        )

    def check_ranks(self) -> float:
        """For when there is no work: raises RankFailure if a rank is gone or does not answer. Returns after how many
        seconds to call again at the latest."""
        return self._ranks.ping() if self._ranks else math.inf

    @property
    def pids(self) -> dict[int, int]:
        """Process of each rank on this machine, by rank."""
        return {0: os.getpid(), **(self._ranks.pids if self._ranks else {})}

    def close(self) -> None:
        """Give memory back and end the other ranks; the engine cannot be used after."""
        if self._ranks:
            self._ranks.close()
        self.__dict__.pop("_worker", None)
        torch.set_num_threads(self._threads_before)

    def _run(self, plan: StepPlan, meanwhile: Callable[[], None] = nothing) -> StepResult:
        """One round on all ranks."""
        with self._ranks.round(plan) if self._ranks else contextlib.nullcontext():
            return self._worker.execute(plan, meanwhile)

    def _draft_group(self, group: Group) -> Group | None:
        """The ranks that share the draft model, if there is one."""
        count = self._config.speculation.draft_ranks(group.size)
        return self._ranks.join_first(count) if self._ranks and 0 < count < group.size else group

    def make_controller(self) -> Controller:
        """The one that the config describes. While there are no requests: it may have to measure rounds."""
        speculation = self._config.speculation
        if speculation.gamma != "auto":
            return FixedGamma(speculation.gamma)
        key = profile_key(self._config, self._sizes)
        samples = recall(key)
        if samples is None:
            samples = profile(self.profiler, self._config)
            keep(key, samples)
        times = StepTimes(samples, draft_reads(self._config))
        budgets = list(budget_policies(self._config)) or [0]
        return AutoGamma(times, speculation.gamma_max, budgets, speculation.kv.budget)

    def _commit(self, plan: StepPlan, requests: list[Request], result: StepResult) -> list[RequestOutput]:
        self._accounts.round(plan, requests)
        yielded = self._scheduler.commit(plan, requests, result)
        outputs = []
        for (request, tokens), row in zip(yielded, result.rows, strict=True):
            accepted = min(row.accepted, len(tokens))
            self._accounts.yielded(request, row.drafted, accepted, len(tokens))
            outputs.append(output_of(request, tokens, row))
        return outputs

    def _give_up(self, requests: list[Request], error: Exception) -> list[RequestOutput]:
        """End the requests of a round that failed. Nothing of it is left: a row's state is set anew when it starts."""
        log.error("out of memory; a round of %d requests fails: %s", len(requests), error)
        for request in requests:
            self._scheduler.abort(request.id)
        reason = f"the model ran out of memory in a batch of {len(requests)} requests"
        return [RequestOutput(r.id, finish_reason=FINISH_ABORT, error=reason, retry=RETRY_MEMORY) for r in requests]

    def _check_if_idle(self) -> None:
        if not self._scheduler.running and self._pages.free != self._pages.total:
            self._scheduler.check()  # raises, and says which page
