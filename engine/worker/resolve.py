"""Resolve the settings for this model and machine: device, precision, lengths, and size of the KV pool."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from engine.batch.tail_pages import num_exact_pages
from engine.config.deployment import CacheConfig, ConfigError, EngineConfig
from engine.config.kv import KVState
from engine.config.target_reading import TargetQuestConfig
from engine.kv.streaming_heads import read_streaming_heads
from engine.scheduler.sliding_pages import max_sliding_pages, window_room
from engine.worker.kernels import choose_ops
from engine.worker.sliding_limits import check_sliding, grouped
from engine.worker.weight_choice import loaded_formats
from kernels.cpu.compiler import supported
from kernels.cpu.cpus import usable_cores
from kernels.kv.kv_bits import KV_BITS
from kernels.ops import Ops
from models.config import ModelConfig, read_config
from models.decoder import DecoderModel
from models.default import resolve_model
from parallel.split import split_heads

log = logging.getLogger(__name__)

_CPU_MEMORY_GB = 4.0
_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True, slots=True)
class Resolved:
    """Resolved settings, all but possibly the size of the pool.

    path: the model's directory. shape: its config. ops: the kernels. threads: CPU threads per rank. num_pages: pages of
    the pool, the same on every rank, or, where no layer keeps the KV of all tokens, of the pool of sliding layers
    (engine.scheduler.sliding_pages.pool_pages); None: as many as fit on the devices (engine.worker.kv_memory), which
    may then lower max_model_len. kv_token_bytes: KV of one token in that pool, over all ranks. token_bytes,
    sliding_bytes, fixed_bytes: on the rank with the largest share, KV for each token of the pool, KV for each token of
    the pool of sliding layers, and what is kept whatever their sizes: KV of drafts, exact pages of rows, and chosen
    pages.
    """

    path: Path
    shape: ModelConfig
    device: torch.device
    dtype: torch.dtype
    ops: Ops
    threads: int
    max_model_len: int
    num_pages: int | None
    kv_token_bytes: int
    token_bytes: int
    fixed_bytes: int
    sliding_bytes: int = 0

    @property
    def shared_stretch(self) -> int:
        """See Ops.shared_stretch. Rows share no reads of windows."""
        return 0 if self.shape.all_slide else self.ops.shared_stretch(self.shape.head_dim)

    def fill_in(self, config: EngineConfig) -> EngineConfig:
        """Return the same config with these values, for ranks that must not resolve anything themselves. Where devices
        decide on the pool, max_model_len remains open: the ranks decide on it together."""
        return config.model_copy(
            update={
                "model": str(self.path),
                "device": self.device.type,
                "dtype": str(self.dtype).removeprefix("torch."),
                "kernels": self.ops.kind,
                "threads": self.threads,
                "max_model_len": config.max_model_len if self.num_pages is None else self.max_model_len,
                "cache": config.cache.model_copy(update={"num_pages": self.num_pages}),
            }
        )


def resolve(
    config: EngineConfig,
    model: DecoderModel | None,
    *,
    sizes_pool: bool = True,
    compiling: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
) -> Resolved:
    """Resolve a deployment's settings. model: a loaded model, used instead of `config.model`. sizes_pool: false where
    no pool is made: its size, and a lower max_model_len that would follow from it, remain open. compiling: see
    choose_ops.

    Raises ValueError (ConfigError, ModelError) for settings or a model that cannot be served.
    """
    path, ranks = resolve_model(config.model), config.tensor_parallel_size
    device = _device(config.device)
    shape = read_config(path) if model is None else model.config
    dtype = _dtype(config.dtype, device) if model is None else model.dtype
    try:
        kv_heads = [mine.kv_heads.size for mine in split_heads(shape.num_heads, shape.num_kv_heads, ranks)]
    except ValueError as error:
        raise ConfigError(f"engine.tensor_parallel_size: {error}") from error
    draft = _draft_shape(config, shape)
    shape = grouped(config, shape)
    check_sliding(config, shape, draft)
    pool_bytes = fixed_bytes = 0
    for name, each in config.by_drafter.items():
        of_pool, fixed = _draft_bytes(each, shape if draft is None or name == "self" else draft, dtype)
        pool_bytes, fixed_bytes = pool_bytes + of_pool, fixed_bytes + fixed
    pool_bytes += _kv_bytes(shape, dtype, max(kv_heads), config.cache.format)
    fixed_bytes += num_exact_pages(config) * config.cache.page_size * _kv_bytes(shape, dtype, max(kv_heads))
    if config.target_kv is not None:
        _check_target_kv(config.target_kv, shape, ranks)
        page = config.cache.page_size
        kept = config.target_kv.state(page, config.speculation.max_draft_tokens, "self")
        pool_bytes += _summary_bytes(kept, shape, dtype, max(kv_heads), page)
        fixed_bytes += config.scheduler.max_rows * _choice_bytes(kept, shape, max(kv_heads))
    head_dims = [each.head_dim for each in (shape, draft) if each is not None]
    ops = (
        model.ops
        if model is not None
        else choose_ops(config.kernels, device, dtype, head_dims, compiling, kv_format=config.cache.format)
    )
    _check_weights(config, ops, model)
    check_kv_format(config, ops)
    resolved = Resolved(
        path=path,
        shape=shape,
        device=device,
        dtype=dtype,
        ops=ops,
        threads=threads_per_rank(config),
        max_model_len=_max_model_len(config, shape),
        num_pages=None,
        kv_token_bytes=len(shape.attention_groups[0] or shape.attention_groups[1])
        * _layer_bytes(shape, dtype, sum(kv_heads), config.cache.format),
        token_bytes=pool_bytes,
        fixed_bytes=fixed_bytes,
        sliding_bytes=len(shape.attention_groups[1]) * _layer_bytes(shape, dtype, max(kv_heads)),
    )
    if not sizes_pool:
        return resolved
    if config.cache.num_pages is None and config.cache.memory_gb is None and device.type == "cuda":
        return resolved
    if config.cache.gpu_memory_utilization != CacheConfig.model_fields["gpu_memory_utilization"].default:
        instead = "num_pages" if config.cache.num_pages is not None else "memory_gb"
        where = "" if device.type == "cuda" else "on a CPU "
        raise ConfigError(f"engine.cache.gpu_memory_utilization: {where}{instead} sets the size of the pool")
    if config.cache.num_pages is not None:
        return _with_pool(config, resolved, config.cache.num_pages, f"cache.num_pages ({config.cache.num_pages})")
    memory = _CPU_MEMORY_GB if config.cache.memory_gb is None else config.cache.memory_gb
    return fit_pool(
        config, resolved, int(memory * 1e9), f"cache.memory_gb, {memory:g}", f"cache.memory_gb ({memory:g})"
    )


def threads_per_rank(config: EngineConfig) -> int:
    """Return the CPU threads of each rank: `engine.threads`, or an equal share of what torch and the system allow."""
    return config.threads or max(1, min(torch.get_num_threads(), usable_cores()) // config.tensor_parallel_size)


def fit_pool(
    config: EngineConfig, resolved: Resolved, memory: int, source: str, setting: str, *, warns: bool = True
) -> Resolved:
    """Return `resolved` with the pool that fits into `memory` bytes in addition to what is kept for rows, and a lower
    max_model_len where the config leaves it open and the pool holds less.

    source, setting: that memory and what sets it, in messages. warns: whether to log a lower max_model_len. Raises
    ConfigError.
    """
    if resolved.fixed_bytes >= memory > 0:
        raise ConfigError(
            f"engine.cache: {setting} leaves {memory / 1e9:.3g} GB, no more than the {resolved.fixed_bytes / 1e9:.3g} "
            f"GB that {_keepers(config)} keep for {config.scheduler.max_rows} rows; lower {_budgets(config)} or "
            f"scheduler.max_rows, or raise {setting.partition(' ')[0]}"
        )
    left, page = max(0, memory - resolved.fixed_bytes), config.cache.page_size
    pages, window = left // (page * (resolved.token_bytes + resolved.sliding_bytes)), resolved.shape.windows[1]
    if window and resolved.token_bytes and (sliding := max_sliding_pages(config, window)) < pages:
        # Other layers have what sliding ones need no more.
        pages = (left - sliding * page * resolved.sliding_bytes) // (page * resolved.token_bytes)
    beside = _describe_kept(config, resolved.fixed_bytes, source)
    return _with_pool(config, resolved, pages, setting, beside, warns=warns)


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("engine.device: no CUDA device is visible")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def check_kv_format(config: EngineConfig, ops: Ops) -> None:
    """Raise ConfigError for KV that the kernels do not read."""
    wanted = config.cache.format
    if wanted not in ops.kv_formats:
        known = ", ".join(each for each in KV_BITS if each in ops.kv_formats)
        raise ConfigError(f"engine.cache.format: {ops.kind} kernels do not read {wanted} KV, but {known}")


def _check_weights(config: EngineConfig, ops: Ops, model: DecoderModel | None) -> None:
    """Raise ConfigError for weights that the kernels do not multiply by, or that a loaded model does not have."""
    own: set[str | None] | None = None
    drafts: set[str | None] | None = None
    if model is not None:
        own = loaded_formats(model)
        if "self" in config.by_drafter:
            drafts = own | {model.weights.drafts}
    for setting, wanted, has in (
        ("weights", config.weights, own),
        ("speculation.weights", config.speculation.weights, drafts),
    ):
        if wanted in ("auto", "same"):
            continue
        if wanted not in ops.weight_formats:
            known = ", ".join(sorted(ops.weight_formats))
            reason = f"{ops.kind} kernels do not multiply by {wanted} weights, but by {known}"
            raise ConfigError(f"engine.{setting}: {reason}")
        if has is not None and wanted not in has:
            raise ConfigError(f"engine.{setting}: the model was loaded without {wanted} weights")


def _check_target_kv(target: TargetQuestConfig, shape: ModelConfig, ranks: int) -> None:
    """Raise ConfigError for a model or a number of ranks that such a target does not support."""
    if ranks > shape.num_kv_heads:
        raise ConfigError(
            f"engine.target_kv: {ranks} ranks would split the query heads of {shape.num_kv_heads} KV heads, which "
            f"choose together; set tensor_parallel_size to at most {shape.num_kv_heads}"
        )
    if target.heads is not None:
        read_streaming_heads(target.heads, shape)  # every rank reads it again, once its model is loaded


def _dtype(name: str, device: torch.device) -> torch.dtype:
    """Resolve the dtype: `auto` is bfloat16 where the device multiplies it natively, else float32."""
    if name != "auto":
        return _DTYPES[name]
    native = torch.cuda.is_bf16_supported() if device.type == "cuda" else supported()[0].has_bf16
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


def _kv_bytes(shape: ModelConfig, dtype: torch.dtype, kv_heads: int, format: str = "dense") -> int:
    """Return the bytes of KV per token in layers that keep all of it. format: of the pages that hold it."""
    return len(shape.attention_groups[0]) * _layer_bytes(shape, dtype, kv_heads, format)


def _layer_bytes(shape: ModelConfig, dtype: torch.dtype, kv_heads: int, format: str = "dense") -> int:
    """Return the bytes of KV per token and layer. format: of the pages that hold it."""
    return kv_heads * KV_BITS[format].token_bytes(shape.head_dim, dtype.itemsize)


def _draft_shape(config: EngineConfig, target: ModelConfig) -> ModelConfig | None:
    """Read the config of the draft model, if there is one. Raises ConfigError if it cannot draft for the target."""
    if config.speculation.draft_model is None:
        return None
    shape = replace(read_config(resolve_model(config.speculation.draft_model)), keeps_all_kv=True)
    if shape.vocab_size != target.vocab_size:
        raise ConfigError(
            f"engine.speculation.model: it has a vocabulary of {shape.vocab_size} tokens, the target of "
            f"{target.vocab_size}"
        )
    return shape


def _draft_bytes(config: EngineConfig, shape: ModelConfig, dtype: torch.dtype) -> tuple[int, int]:
    """Compute the memory of a model's drafts on the rank with the largest share: bytes per token of the pool, and fixed
    bytes.

    A draft model that keeps the KV of all tokens has a page for each of the target's, and a policy may summarise pages,
    unless the target itself does. SnapKV's cache, the queries that choose, chosen pages, and a draft model's window are
    of fixed size. config: of one model that drafts (EngineConfig.by_drafter). shape: that model's.
    """
    settings = config.speculation
    ranks = settings.draft_ranks(config.tensor_parallel_size) or config.tensor_parallel_size
    try:
        heads = split_heads(shape.num_heads, shape.num_kv_heads, ranks)
    except ValueError as error:
        raise ConfigError(f"engine.speculation.tensor_parallel_size: {error}") from error
    kept, page = settings.kv_state(config.cache.page_size), config.cache.page_size
    query_bytes = len(shape.attention_groups[0]) * shape.head_dim * dtype.itemsize
    rows, drafts_itself = config.scheduler.max_rows, settings.drafting_model == "self"
    copied = config.cache.bits.written if drafts_itself else "dense"
    fixed_bytes = max(
        rows * kept.pages * page * _kv_bytes(shape, dtype, mine.kv_heads.size, copied)
        + rows * kept.queries * mine.heads.size * query_bytes
        + (rows + 1) * _choice_bytes(kept, shape, mine.kv_heads.size)  # one is of no row (PageChoice.nobody)
        for mine in heads
    )
    kv_heads = max(mine.kv_heads.size for mine in heads)
    summaries = (
        0 if drafts_itself and config.target_kv is not None else _summary_bytes(kept, shape, dtype, kv_heads, page)
    )
    return _kv_bytes(shape, dtype, kv_heads) * settings.has_draft_pages + summaries, fixed_bytes


def _summary_bytes(kept: KVState, shape: ModelConfig, dtype: torch.dtype, kv_heads: int, page_size: int) -> int:
    """Return the bytes per token of the vectors that are kept for each page. A key is half of a token's KV."""
    return -(-kept.summaries * _kv_bytes(shape, dtype, kv_heads) // (2 * page_size))


def _choice_bytes(kept: KVState, shape: ModelConfig, kv_heads: int) -> int:
    """Return the bytes per row slot of the chosen pages that are kept, as int32."""
    return 4 * kept.choices * len(shape.attention_groups[0]) * (kv_heads if kept.per_head else 1)


def _with_pool(
    config: EngineConfig, resolved: Resolved, pages: int, setting: str, beside: str = "", *, warns: bool = True
) -> Resolved:
    """See fit_pool. The pool has at most the pages that all rows together can use. beside: describes what else the
    memory holds.

    Raises ConfigError unless the longest request fits alone, so that every admitted request can finish.
    """
    page_size, length = config.cache.page_size, resolved.max_model_len
    needed, also = -(-length // page_size), ""
    if not resolved.shape.attention_groups[0]:
        needed = window_room(config, resolved.shape.windows[1]).pages(1, needed)
        also = " or lower scheduler.max_batch_tokens"  # tokens that a row may have beside its window
    if pages < needed and pages and config.max_model_len is None:
        if warns:
            log.warning(
                "max_model_len is %d tokens, of the model's %d: %s holds no more%s; raise it%s to serve longer "
                "requests",
                pages * page_size,
                length,
                setting,
                beside.rstrip(","),
                also,
            )
        length, needed = pages * page_size, pages
    if pages < needed:
        raise ConfigError(
            f"engine.cache: {pages} pages of {page_size} tokens{beside} hold less than one request of "
            f"max_model_len {length} ({needed} pages); raise {setting.partition(' ')[0]} or lower max_model_len{also}"
        )
    pages = min(pages, config.scheduler.max_rows * -(-length // page_size))
    return replace(resolved, num_pages=pages, max_model_len=length)


def _keepers(config: EngineConfig) -> str:
    """Name what keeps KV for rows, in messages."""
    if config.cache.seals:
        return "drafts and pages that are not sealed"
    return "drafts" if config.target_kv is None else "drafts and choices of the target"


def _budgets(config: EngineConfig) -> str:
    if config.cache.seals:
        return "speculation.kv.budget, scheduler.max_batch_tokens"
    return "speculation.kv.budget" if config.target_kv is None else "speculation.kv.budget, target_kv.budget"


def _describe_kept(config: EngineConfig, fixed_bytes: int, source: str) -> str:
    """Describe, for messages, what shares the pool's memory."""
    if not fixed_bytes:
        return ""
    rows = config.scheduler.max_rows
    return (
        f", beside the {fixed_bytes / 1e9:.3g} GB of {source}, that {_keepers(config)} keep for {rows} rows "
        f"({_budgets(config)}, scheduler.max_rows),"
    )
