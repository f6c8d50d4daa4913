"""The engine: scheduler and ranks, one round at a time. Works on tokens; engine.text converts them to text."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import math
import os
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import partial

import msgspec
import torch

from engine.config.deployment import EngineConfig
from engine.config.speculation import Source
from engine.messages import FINISH_ABORT, RETRY_MEMORY, AddRequest, EngineState, EngineStats, Ready, RequestOutput
from engine.oom import OutOfMemory
from engine.plan import RoundPlan, RoundResult, WeightStep
from engine.ranks.executor import RankExecutor
from engine.ranks.resident_weights import ResidentWeights
from engine.scheduler.controller import Controller
from engine.scheduler.kv_audit import KVAudit
from engine.scheduler.kv_manager import KVManager
from engine.scheduler.outputs import failed_output, make_output
from engine.scheduler.request import Request
from engine.scheduler.scheduler import Scheduler
from engine.scheduler.sliding_pages import make_sliding_pages
from engine.scheduler.stats import StatsRecorder
from engine.scheduler.validation import check_fields
from engine.worker.controllers import draft_reads, make_controller, make_request_ngrams, target_tokens_read
from engine.worker.profiler import Profiler
from engine.worker.resolve import resolve
from engine.worker.start_log import log_started
from engine.worker.weight_choice import settle_draft_format
from engine.worker.worker import Worker, noop
from engine.worker.worker_owner import WorkerOwner
from models.decoder import DecoderModel
from parallel.group import Group

log = logging.getLogger(__name__)


class Engine:
    """Queues requests and runs them round by round. Not thread-safe: one loop owns it.

    ready: description of the engine for API processes. profiler: measures rounds, while there are no requests.
    weight_bytes: of all ranks. overlaps: whether the host is free while a round runs. restarted: after `step` has
    raised an error, whether all requests go on nevertheless.
    """

    _ranks: RankExecutor | None = None

    def __init__(
        self,
        config: EngineConfig,
        *,
        model: DecoderModel | None = None,
        controller: Controller | None = None,
        ranks: Callable[[EngineConfig, torch.device], RankExecutor] = RankExecutor.launch,
        compiling: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
        progress: bool = True,
    ) -> None:
        """Load the model and reserve its memory, on all ranks.

        model: a loaded model, used instead of `config.model`'s weights (rank 0's shard of it, with several ranks).
        controller: used instead of the one that the config describes. ranks: starts the other ranks, if there are any;
        its config has every setting resolved. compiling: entered while kernels are compiled, which takes minutes; other
        ranks are started after that. progress: show a bar on stderr while loading.
        Raises ValueError (ConfigError, ModelError) for settings or files that cannot be served, RankFailure.
        """
        self._config, self._resolved = config, resolve(config, model, compiling=compiling)
        self._threads_before = torch.get_num_threads()
        self._ngrams = make_request_ngrams(config, self._resolved, lambda *drafts: self._worker.count_allowed(*drafts))
        try:
            self._owner = self._start_ranks(model, ranks, progress)
            self._resolved = dataclasses.replace(  # GPUs are measured once the model is loaded
                self._resolved, num_pages=self._worker.num_pages, max_model_len=self._worker.max_model_len
            )
            self._kv = self._make_kv()
            sizes = self._worker.num_pages, self._resolved.max_model_len, self._shared_stretch, self._kv.total_sliding
            self.profiler = Profiler(self._run_blank, config, *sizes, vocab_size=self._resolved.shape.vocab_size)
            if controller is None:
                controller = self.make_controller()
        except BaseException:
            self.close()
            raise
        self._weights = ResidentWeights(str(self._resolved.path), self._perform)
        self._paused = False
        self.overlaps = self._resolved.device.type != "cpu"
        self.restarted = False
        self._round_running = False
        self._aborted: list[str] = []  # requests aborted while a round runs
        self._scheduler = self._make_scheduler(controller)
        self._stats = self._make_stats(controller)
        self._no_grammars = self._worker.no_grammars
        self.weight_bytes = self._worker.weight_bytes
        if self._ranks:
            self.weight_bytes += self._ranks.weight_bytes
        shape = self._worker.model.config
        self.ready = Ready(
            model=self._resolved.path.name,
            max_model_len=self._resolved.max_model_len,
            vocab_size=shape.vocab_size,
            eos_token_ids=list(shape.eos_token_ids),
            stats=self.stats(),
        )
        log_started(config, self._resolved, self._worker.num_pages, self._owner.weight_formats)

    # -- start-up ------------------------------------------------------------------------------------------------------

    def _start_ranks(
        self, model: DecoderModel | None, ranks: Callable[[EngineConfig, torch.device], RankExecutor], progress: bool
    ) -> WorkerOwner:
        """Start the other ranks, and load this rank's worker while they load theirs."""
        config, resolved = self._config, self._resolved
        if resolved.device.type == "cpu":
            torch.set_num_threads(resolved.threads)
        group = Group.single()
        if config.tensor_parallel_size > 1:
            filled = resolved.fill_in(config)
            # A model that is loaded has the formats it has.
            filled = settle_draft_format(filled, resolved.ops) if model is None else filled
            self._ranks = ranks(filled, resolved.device)
            group = self._ranks.group
        count = config.speculation.draft_ranks(group.size)
        draft_group = self._ranks.join_first(count) if self._ranks and 0 < count < group.size else group
        owner = WorkerOwner(config, resolved, resolved.device, group, draft_group, model=model, progress=progress)
        if self._ranks:
            self._ranks.wait_ready(config.start_timeout_s)
        return owner

    @property
    def _worker(self) -> Worker:
        """This rank's worker; there is none while the engine is asleep."""
        return self._owner.worker

    def make_controller(self, drafter: Source | None = None) -> Controller:
        """Make the controller that the config describes, or that of a drafter which is part of it. Call it only while
        there are no requests, since it may measure rounds."""
        config, speculation = self._config, self._config.speculation
        if drafter is not None:
            config = config.model_copy(update={"speculation": speculation.model_copy(update={"drafter": drafter})})
        return make_controller(config, self._resolved, self._worker, self.profiler)

    @property
    def _shared_stretch(self) -> int:
        """See Ops.shared_stretch. Rows whose positions choose what they read share no reads."""
        return 0 if self._config.target_kv is not None else self._resolved.shared_stretch

    def _make_kv(self) -> KVManager:
        config, speculation, pages = self._config, self._config.speculation, self._worker.pages
        return KVManager(
            pages.full,
            config.cache.page_size,
            prefix=config.cache.prefix,
            prompts_only=config.target_kv is not None,
            num_uncached_tokens=speculation.num_uncached_tokens,
            draft_pages=speculation.has_draft_pages,
            shared_stretch=self._shared_stretch,
            sliding=make_sliding_pages(config, self._worker.model.config, pages.sliding),
        )

    def _make_scheduler(self, controller: Controller) -> Scheduler:
        config = self._config
        return Scheduler(
            kv=self._kv,
            page_size=config.cache.page_size,
            max_rows=config.scheduler.max_rows,
            max_batch_tokens=config.scheduler.max_batch_tokens,
            max_waiting=config.scheduler.max_waiting,
            max_model_len=self._resolved.max_model_len,
            eos_token_ids=self._worker.model.config.eos_token_ids,
            controller=controller,
            draft_kv=config.speculation.draft_model is not None,
            kv_bits=config.cache.bits,
            audit=KVAudit(self._kv, exact=self._resolved.ops.kind == "cpu") if config.check_invariants else None,
            ngrams=self._ngrams,
        )

    def _make_stats(self, controller: Controller) -> StatsRecorder:
        config, drafting = self._config, [each.speculation for each in self._config.by_drafter.values()]
        return StatsRecorder(
            pages_total=self._worker.num_pages,
            page_size=config.cache.page_size,
            bytes_per_token=self._resolved.kv_token_bytes,
            gamma_max=controller.gamma_max,
            draft_reads=draft_reads(config),
            policy=" and ".join(dict.fromkeys(each.kv.policy for each in drafting)),
            draft_pages_per_row=sum(each.kv_state(config.cache.page_size).pages for each in drafting),
            target_tokens_read=target_tokens_read(config, self._resolved.shape),
            target_kv=config.target_kv.summary if config.target_kv else None,
            kv_format=config.cache.format,
        )

    # -- requests ------------------------------------------------------------------------------------------------------

    def check(self, request: AddRequest) -> None:
        """Raise RequestError for a request that can never run."""
        check_fields(request, self.ready.vocab_size, self.ready.eos_token_ids, self._no_grammars)
        self._scheduler.check_request(request)

    def add(self, request: AddRequest) -> None:
        """Queue a request. Raises RequestError for one that can never run, QueueFull if too many run or wait."""
        self.check(request)
        self._scheduler.add(request)

    def abort(self, ids: Iterable[str]) -> None:
        """Drop requests and free their pages: at once, or at the end of the running round. Unknown ids are ignored."""
        if self._round_running:
            self._aborted += ids
            return
        for request_id in ids:
            self._scheduler.abort(request_id)
        self._check_if_idle()

    def reset_prefix_cache(self) -> None:
        """Forget all KV that later requests could find. What running ones have computed stays theirs."""
        self._scheduler.reset_prefix_cache()

    def has_work(self) -> bool:
        """Whether `step` runs a round: not while the engine is paused or asleep."""
        return self.state is EngineState.RUNNING and self._scheduler.has_work

    # -- pause, and changes of weights ---------------------------------------------------------------------------------

    @property
    def state(self) -> EngineState:
        if self._weights.asleep:
            return EngineState.ASLEEP
        return EngineState.PAUSED if self._paused else EngineState.RUNNING

    def pause(self, abort: bool = False) -> list[RequestOutput]:
        """Begin no round until `resume`. Requests wait, running ones with their KV. abort: end all of them; returns
        their last outputs."""
        self._paused = True
        ids = [request.id for request in (*self._scheduler.running, *self._scheduler.waiting)] if abort else []
        self.abort(ids)
        return [RequestOutput(id, finish_reason=FINISH_ABORT) for id in ids]

    def resume(self) -> None:
        """Go on; an engine that is asleep does so once it wakes."""
        self._paused = False

    def update_weights(self, path: str) -> None:
        """Replace the target's weights by those of the model directory `path`. Running requests keep their tokens;
        their KV is computed anew. Raises WeightsRefused: the old weights are in force."""
        self._weights.check(path)
        self._scheduler.restart_all()
        self._weights.replace(path)

    def sleep(self) -> None:
        """Free the weights and the KV of all ranks, until `wake_up`. Requests wait with their tokens."""
        if not self._weights.asleep:
            self._scheduler.restart_all()
            self._weights.release()

    def wake_up(self) -> None:
        """Load the weights back. Raises WeightsRefused: the engine is still asleep."""
        self._weights.wake_up()

    def _perform(self, step: WeightStep) -> str | None:
        if self._ranks is None:
            return self._owner.perform(step)
        return self._ranks.perform(step, self._owner.perform, self._config.start_timeout_s)

    # -- rounds --------------------------------------------------------------------------------------------------------

    def step(self, meanwhile: Callable[[], None] = noop) -> list[RequestOutput]:
        """Run one round, if there is work. Returns the outputs of rows that sampled, ended or failed.

        meanwhile: the host's other work; called, perhaps repeatedly, while a device is busy with the round. If any rank
        runs out of memory, the round's requests end with an error or, where ranks cannot abandon a round
        (Group.can_abandon), RankFailure is raised. If anything else ends the round's work early, such as Ctrl-C, its
        requests are computed anew (`restarted`). Raises RankFailure.
        """
        if not self.has_work():
            return []
        self.restarted = False
        began = time.perf_counter()
        plan, requests = self._scheduler.schedule()
        self._round_running = True
        try:
            # With a grammar, the host waits for drafts before the whole round is sent to the device.
            if any(request.params.grammar is not None for request in requests):
                meanwhile()
            result = self._run(plan, partial(self._while_busy, requests, meanwhile))
        except OutOfMemory as error:
            meanwhile()  # the round may have failed before its own call
            outputs = self._fail(requests, error)
        except BaseException:
            self._scheduler.restart_rows(requests)
            self.restarted = True
            raise
        else:
            outputs = self._commit(plan, requests, result)
            self._stats.record_time(result, time.perf_counter() - began)
        finally:
            self._round_running = False
        aborted, self._aborted = self._aborted, []
        self.abort(aborted)  # also checks pages if the engine is idle
        if self._config.check_invariants:
            self._scheduler.check()
        return outputs

    def _while_busy(self, requests: list[Request], meanwhile: Callable[[], None]) -> None:
        """Do the host's work beside a round of these requests."""
        meanwhile()
        if self.overlaps and self._ngrams is not None and self._scheduler.controller.takes_text:
            self._ngrams.prepare(requests)

    def reset(self) -> None:
        """Drop all requests, whatever state an interrupted `step` has left them in."""
        self._round_running, self._aborted = False, []
        before, self._kv = self._kv, self._make_kv()
        self._kv.continue_counts(before)
        preemptions = self._scheduler.preemptions
        self._scheduler = self._make_scheduler(self._scheduler.controller)
        self._scheduler.preemptions = preemptions

    def _run(self, plan: RoundPlan, meanwhile: Callable[[], None] = noop) -> RoundResult:
        """Run one round on all ranks."""
        with self._ranks.round(plan) if self._ranks else contextlib.nullcontext():
            return self._worker.execute(plan, meanwhile)

    def _run_blank(self, plan: RoundPlan) -> RoundResult:
        """Run a round of rows that are not requests', over any pages of the pool, while there are no requests."""
        self._kv.reset(())
        return self._run(plan)

    def _commit(self, plan: RoundPlan, requests: list[Request], result: RoundResult) -> list[RequestOutput]:
        self._stats.record_plan(plan, requests, self._scheduler.shared_tokens)
        outputs = []
        for request, tokens, row, failure, origin in self._scheduler.commit(plan, requests, result):
            drafted, accepted = (row.drafted, min(row.accepted, len(tokens))) if row else (0, 0)
            self._stats.record_row(request, drafted, accepted, len(tokens), origin)
            if failure is None or tokens:
                outputs.append(make_output(request, tokens, row, origin))
            if failure is not None:
                outputs.append(failed_output(request, failure))
        return outputs

    def _fail(self, requests: list[Request], error: Exception) -> list[RequestOutput]:
        """End the requests of a round that ran out of memory. A row slot's state is reset at the next start."""
        log.error("out of memory; a round of %d requests fails: %s", len(requests), error)
        for request in requests:
            self._scheduler.abort(request.id)
        reason = f"the model ran out of memory in a batch of {len(requests)} requests"
        return [RequestOutput(r.id, finish_reason=FINISH_ABORT, error=reason, retry=RETRY_MEMORY) for r in requests]

    def _check_if_idle(self) -> None:
        if not self._scheduler.running and self._kv.owned:
            self._scheduler.check()  # raises, and names the page

    # -- state ---------------------------------------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        """Return a copy of the current counters."""
        totals, report = self._stats.totals, self._scheduler.controller.report
        return msgspec.structs.replace(
            totals,
            state=self.state,
            weights=self._owner.weight_formats,
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            preemptions=self._scheduler.preemptions,
            **self._kv.counters(),
            decode_seconds=report.decode_seconds,
            plain_seconds=report.plain_seconds,
            forecast_seconds=report.forecast_seconds,
            alpha=report.alpha,
            accepted_per_position=totals.accepted_per_position[:],
            gamma_chosen=totals.gamma_chosen[:],
        )

    def check_ranks(self) -> float:
        """Check on the other ranks while there is no work. Returns the seconds until the next call is due. Raises
        RankFailure if a rank is gone or does not answer."""
        return self._ranks.ping() if self._ranks else math.inf

    @property
    def pids(self) -> dict[int, int]:
        """Process id of each rank on this machine, by rank."""
        return {0: os.getpid(), **(self._ranks.pids if self._ranks else {})}

    def close(self) -> None:
        """Free memory and end the other ranks; the engine cannot be used afterwards."""
        if self._ranks:
            self._ranks.close()
        owner: WorkerOwner | None = self.__dict__.pop("_owner", None)
        if owner is not None:
            owner.close()
        torch.set_num_threads(self._threads_before)
        if self._resolved.device.type == "cuda":
            gc.collect()  # an error's traceback may hold tensors
            torch.cuda.empty_cache()  # other engines size their pools by what is free
