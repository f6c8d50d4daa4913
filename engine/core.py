"""The engine: scheduler and ranks, one round at a time. Knows tokens, not text."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable

import msgspec
import torch

from engine.config import ConfigError, EngineConfig, WindowConfig
from engine.messages import AddRequest, EngineStats, Ready, RequestOutput, TokenLogprobs
from engine.pages import PageAllocator
from engine.plan import StepPlan, StepResult
from engine.ranks import Ranks
from engine.request import Request
from engine.scheduler import RequestError, Scheduler
from engine.speculation.build import load_draft
from engine.speculation.controller import Controller, FixedGamma
from engine.speculation.policies import make_policy
from engine.stats import Accounts
from engine.worker import Worker
from kernels.kv_cache import KVPool
from models.config import ModelConfig, read_config
from models.default import resolve_model
from models.llama import Llama
from models.loader import load_model
from parallel.group import Group
from parallel.split import split_heads

log = logging.getLogger(__name__)

_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


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
        path = resolve_model(config.model)
        size = config.tensor_parallel_size
        device = device_of(config.device, size)
        shape = read_config(path) if model is None else model.config
        dtype = dtype_of(config.dtype, device) if model is None else model.dtype
        try:
            kv_heads = [mine.kv_heads.size for mine in split_heads(shape.num_heads, shape.num_kv_heads, size)]
        except ValueError as error:
            raise ConfigError(f"engine.tensor_parallel_size: {error}") from error
        bytes_per_token = _kv_bytes(shape, dtype, sum(kv_heads))
        draft_shape = _draft_shape(config, shape)
        draft_bytes = _draft_bytes(config, draft_shape, dtype) if draft_shape else 0
        max_model_len = _max_model_len(config, shape)
        num_pages = _num_pages(config, max_model_len, _kv_bytes(shape, dtype, max(kv_heads)) + draft_bytes)
        self._config = config
        self._threads_before = torch.get_num_threads()
        threads = config.threads or max(1, self._threads_before // size)
        if device.type == "cpu":
            torch.set_num_threads(threads)
        self._ranks: Ranks | None = None
        group = Group.single()
        try:
            if size > 1:
                resolved = {
                    "model": str(path),
                    "device": device.type,
                    "dtype": str(dtype).removeprefix("torch."),
                    "threads": threads,
                    "max_model_len": max_model_len,
                    "cache": config.cache.model_copy(update={"num_pages": num_pages}),
                }
                self._ranks = ranks(config.model_copy(update=resolved), device)
                group = self._ranks.group
            if model is None:
                model = load_model(path, dtype=dtype, device=device, group=group, progress=progress)
            draft = load_draft(config, model, max_model_len, group)
            self._worker = Worker(
                model, config, num_pages=num_pages, max_model_len=max_model_len, group=group, draft=draft
            )
            if self._ranks:
                self._ranks.wait_ready(config.start_timeout_s)
        except BaseException:
            self.close()
            raise
        self._pages = PageAllocator(num_pages)
        controller = controller or FixedGamma(config.speculation.gamma)
        self._scheduler = Scheduler(
            pages=self._pages,
            page_size=config.cache.page_size,
            max_rows=config.scheduler.max_rows,
            max_batch_tokens=config.scheduler.max_batch_tokens,
            max_waiting=config.scheduler.max_waiting,
            max_model_len=max_model_len,
            eos_token_ids=model.config.eos_token_ids,
            controller=controller,
        )
        self.weight_bytes = self._worker.weight_bytes + (self._ranks.weight_bytes if self._ranks else 0)
        self._accounts = Accounts(
            pages_total=num_pages,
            page_size=config.cache.page_size,
            bytes_per_token=bytes_per_token,
            gamma_max=controller.gamma_max,
            draft_reads=_draft_reads(config) if controller.gamma_max else lambda context: 0,
        )
        self.ready = Ready(
            model=path.name,
            max_model_len=max_model_len,
            vocab_size=model.config.vocab_size,
            eos_token_ids=list(model.config.eos_token_ids),
            stats=self.stats(),
        )
        kv_gb = num_pages * config.cache.page_size * bytes_per_token / 1e9
        where = f"{size} × {device.type}" if size > 1 else str(device)
        log.info("%s in %s on %s, KV pool of %d pages (%.2f GB)", path.name, dtype, where, num_pages, kv_gb)

    def check(self, request: AddRequest) -> None:
        """Raise RequestError for a request that can never run."""
        vocab_size = self.ready.vocab_size
        params = request.params
        for what, ids in (
            ("prompt", request.prompt),
            ("logit_bias", params.logit_bias),
            ("stop_token_ids", params.stop_token_ids),
        ):
            # A prompt can have 100,000 tokens, and running rows wait for this.
            if ids and (min(ids) < 0 or max(ids) >= vocab_size):
                token = next(token for token in ids if not 0 <= token < vocab_size)
                raise RequestError(f"{what}: token id {token} is not in the vocabulary of {vocab_size}")
        self._scheduler.check_request(request)

    def add(self, request: AddRequest) -> None:
        """Queue a request. Raises RequestError for one that can never run, QueueFull when too many are here."""
        self.check(request)
        self._scheduler.add(request)

    def abort(self, ids: Iterable[str]) -> None:
        """Forget requests; their pages are free at once. Unknown ids are fine."""
        for request_id in ids:
            self._scheduler.abort(request_id)
        self._check_if_idle()

    def has_work(self) -> bool:
        return self._scheduler.has_work

    def step(self) -> list[RequestOutput]:
        """Run one round; does nothing when there is no work. Returns what it yielded, one per row that sampled."""
        if not self._scheduler.has_work:
            return []
        began = time.perf_counter()
        plan, requests = self._scheduler.schedule()
        with self._ranks.round(plan) if self._ranks else contextlib.nullcontext():
            result = self._worker.execute(plan)
        outputs = self._commit(plan, requests, result)
        self._accounts.took(result, time.perf_counter() - began)
        if self._config.check_invariants:
            self._scheduler.check()
        self._check_if_idle()
        return outputs

    def stats(self) -> EngineStats:
        """A copy of the counters as they stand."""
        totals = self._accounts.totals
        return msgspec.structs.replace(
            totals,
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            pages_free=self._pages.free,
            preemptions=self._scheduler.preemptions,
            accepted_per_position=totals.accepted_per_position[:],
            gamma_chosen=totals.gamma_chosen[:],
        )

    def check_ranks(self) -> None:
        """For when there is no work. Raises RankFailure if a rank is gone."""
        if self._ranks:
            self._ranks.check()

    def close(self) -> None:
        """Give memory back and end the other ranks; the engine cannot be used after."""
        if self._ranks:
            self._ranks.close()
        self.__dict__.pop("_worker", None)
        torch.set_num_threads(self._threads_before)

    def _commit(self, plan: StepPlan, requests: list[Request], result: StepResult) -> list[RequestOutput]:
        self._accounts.round(plan, requests)
        yielded = self._scheduler.commit(plan, requests, result)
        outputs = []
        for (request, tokens), row in zip(yielded, result.rows, strict=True):
            accepted = min(row.accepted, len(tokens))
            self._accounts.yielded(request, row.drafted, accepted, len(tokens))
            outputs.append(
                RequestOutput(
                    id=request.id,
                    tokens=tokens,
                    logprobs=_asked(row.logprobs, request, len(tokens)),
                    drafted=row.drafted,
                    accepted=accepted,
                    finish_reason=request.finish_reason,
                    stop_reason=request.stop_reason,
                    scheduled=request.scheduled or 0.0,
                )
            )
        return outputs

    def _check_if_idle(self) -> None:
        if not self._scheduler.running and self._pages.free != self._pages.total:
            self._scheduler.check()  # raises, and says which page


def _asked(logprobs: list[TokenLogprobs] | None, request: Request, count: int) -> list[TokenLogprobs] | None:
    """The first `count` reports, each with as many alternatives as this request asked for."""
    most = request.params.logprobs
    if logprobs is None or most is None:
        return None
    return [TokenLogprobs(at.logprob, at.top_ids[:most], at.top_logprobs[:most]) for at in logprobs[:count]]


def load_target(config: EngineConfig, *, progress: bool) -> Llama:
    """The model of `config`, all of it, for several engines of this process to share."""
    device = device_of(config.device, 1)
    dtype = dtype_of(config.dtype, device)
    return load_model(resolve_model(config.model), dtype=dtype, device=device, group=Group.single(), progress=progress)


def device_of(name: str, ranks: int) -> torch.device:
    """What the setting `engine.device` means for so many ranks. Raises ConfigError if it is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("engine.device: no CUDA device is visible")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and ranks > torch.cuda.device_count():
        raise ConfigError(f"engine.tensor_parallel_size: {ranks} ranks, but {torch.cuda.device_count()} CUDA devices")
    return torch.device(name)


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """`engine.dtype`: `auto` is bfloat16 where `device` multiplies it natively, else float32."""
    if name != "auto":
        return _DTYPES[name]
    native = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def _max_model_len(config: EngineConfig, model: ModelConfig) -> int:
    if config.max_model_len is None:
        return model.max_model_len
    if config.max_model_len > model.max_model_len:
        raise ConfigError(
            f"engine.max_model_len: {config.max_model_len} is more than the {model.max_model_len} tokens that the "
            "model was made for"
        )
    return config.max_model_len


def _kv_bytes(shape: ModelConfig, dtype: torch.dtype, kv_heads: int) -> int:
    """Of one token."""
    return KVPool.bytes_per_token(num_layers=shape.num_layers, kv_heads=kv_heads, head_dim=shape.head_dim, dtype=dtype)


def _draft_shape(config: EngineConfig, target: ModelConfig) -> ModelConfig | None:
    """Of the draft model, if there is one. Raises ConfigError if it cannot draft for the target."""
    if config.speculation.draft_model is None:
        return None
    shape = read_config(resolve_model(config.speculation.draft_model))
    if shape.vocab_size != target.vocab_size:
        raise ConfigError(
            f"engine.speculation.model: it has a vocabulary of {shape.vocab_size} tokens, the target of "
            f"{target.vocab_size}"
        )
    return shape


def _draft_bytes(config: EngineConfig, shape: ModelConfig, dtype: torch.dtype) -> int:
    """Per token of the pool, on the rank that has most: a draft model that can look back at everything has a page for
    each of the target's; one that reads a window has a pool of fixed size."""
    if isinstance(config.speculation.kv, WindowConfig):
        return 0
    ranks = config.speculation.tensor_parallel_size or config.tensor_parallel_size
    try:
        heads = split_heads(shape.num_heads, shape.num_kv_heads, ranks)
    except ValueError as error:
        raise ConfigError(f"engine.speculation.tensor_parallel_size: {error}") from error
    return _kv_bytes(shape, dtype, max(mine.kv_heads.size for mine in heads))


def _draft_reads(config: EngineConfig) -> Callable[[int], int]:
    """KV slots that a draft step reads of a row with so many tokens."""
    policy = make_policy(config.speculation.kv, config.cache.page_size)
    return lambda context: context - policy.skipped(context)


def _num_pages(config: EngineConfig, max_model_len: int, bytes_per_token: int) -> int:
    """Pages in the pool: what is configured or fits in memory_gb, but no more than all rows can ever use.

    Raises ConfigError unless the longest request fits alone, so that whatever is admitted can finish.
    """
    page_size = config.cache.page_size
    longest = -(-max_model_len // page_size)
    pages = config.cache.num_pages or int(config.cache.memory_gb * 1e9) // (page_size * bytes_per_token)
    if pages < longest:
        raise ConfigError(
            f"engine.cache: {pages} pages of {page_size} tokens hold less than one request of max_model_len "
            f"{max_model_len} ({longest} pages); raise cache.memory_gb or lower max_model_len"
        )
    return min(pages, longest * config.scheduler.max_rows)
