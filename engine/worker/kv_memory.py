"""Size the KV pool on GPUs: the memory that remains after the models are loaded and have run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from engine.batch.forward_graphs import graph_row_counts, prefix_room
from engine.batch.graph_inputs import pages_seen
from engine.batch.runner import make_attention
from engine.config.deployment import EngineConfig
from engine.oom import is_out_of_memory
from engine.plan import DrafterName
from engine.worker.resolve import Resolved, fit_pool
from kernels.attention.base import AttentionBatch
from kernels.flashinfer.flashinfer_sizes import Heads, captured_memory
from kernels.flashinfer.flashinfer_workspace import load_flashinfer, takes_uniform_queries
from models.batch import ForwardBatch, SlidingKV
from models.decoder import DecoderModel
from parallel.group import Group

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes of one device's memory. used: by all processes, before the model runs. running: the largest additional
    amount while it runs."""

    total: int
    used: int
    running: int


def size_pool(
    config: EngineConfig,
    resolved: Resolved,
    model: DecoderModel,
    group: Group,
    memory: DeviceMemory | None = None,
    draft: DecoderModel | None = None,
) -> Resolved:
    """Return `resolved` with the size of the pool, the same on every rank: as resolved, or as many pages as fit on the
    rank with the smallest free memory, and a lower max_model_len where the config leaves it open and they hold
    less.

    Every rank calls this, with all of its weights loaded. memory: used instead of a measurement. draft: this rank's
    shard of a draft model. Raises ConfigError, on every rank, if the longest request does not fit.
    """
    if resolved.num_pages is not None:
        return resolved
    if memory is None:
        memory = measure(config, model)
    share = config.cache.gpu_memory_utilization
    left = int(memory.total * share) - memory.used - memory.running
    if model.ops.make_graphs is not None and config.cuda_graphs:
        left -= memory.running  # about what the tensors of captured forwards take
        if any(each.speculation.kv.counts_votes for each in config.by_drafter.values()):
            from kernels.gpu.attention import VOTE_BYTES  # the import needs Triton

            left -= VOTE_BYTES
        left -= captured_list_bytes(config, model, draft, resolved.max_model_len)
        if model.ops.kind == "flashinfer":
            left -= captured_bytes(config, model, draft, resolved.max_model_len)
    smallest = group.all_gather(torch.tensor([left], dtype=torch.int64, device=model.device)).min()
    named = f"the {int(smallest) / 1e9:.3g} that gpu_memory_utilization {share:g} leaves"
    setting = f"cache.gpu_memory_utilization ({share:g})"
    return fit_pool(config, resolved, int(smallest), named, setting, warns=group.rank == 0)


def allocate(group: Group, device: torch.device, make: Callable[[], T]) -> T:
    """Return what `make` allocates on this rank. Every rank calls this. Raises MemoryError, on all of them, if one has
    too little memory."""
    made, error = None, ""
    try:
        made = make()
    except (RuntimeError, MemoryError) as failure:
        if not is_out_of_memory(failure):
            raise
        error = str(failure) or type(failure).__name__
    failed = group.all_gather(torch.tensor([bool(error)], dtype=torch.int64, device=device)).view(-1)
    if failed.any():
        raise MemoryError(error or f"rank {int(failed.argmax())} has too little")
    assert made is not None
    return made


def captured_list_bytes(
    config: EngineConfig, model: DecoderModel, draft: DecoderModel | None, max_model_len: int
) -> int:
    """Bound the bytes that captured attention to windows keeps: lists of pages and their lengths. draft: a draft model;
    None: there is none."""
    settings, page = config.speculation, config.cache.page_size
    rows = sum(graph_row_counts(config.scheduler.max_rows))

    def lists(model: DecoderModel, queries: list[int]) -> int:
        window = model.window or model.sliding_window
        widths = [min(pages_seen(window, each, page), -(-max_model_len // page)) for each in queries]
        return 8 * rows * sum(width + 1 for width in widths) if window else 0

    twice = 2 if config.cache.prefix else 1  # other layers may read shared pages once
    total = twice * lists(model, [gamma + 1 for gamma in settings.captured_gammas])
    for name in config.by_drafter:
        total += lists(_that_drafts(name, model, draft), _draft_queries(settings.max_model_drafts))
    return total


def _that_drafts(name: DrafterName, model: DecoderModel, draft: DecoderModel | None) -> DecoderModel:
    return model if draft is None or name == "self" else draft


def _draft_queries(steps: int) -> list[int]:
    """Bound the numbers of queries per row in captured forwards of a drafter: in single ones, with one query and with
    two, and in steps, of which the first may have two."""
    return [1, 2, 2] + [1] * (steps - 1)


def captured_bytes(config: EngineConfig, model: DecoderModel, draft: DecoderModel | None, max_model_len: int) -> int:
    """Bound the bytes that FlashInfer's captured attention keeps: scratch memory, and plans and page lists of each
    captured forward. draft: a draft model; None: there is none."""
    settings, page = config.speculation, config.cache.page_size
    rows, gamma = graph_row_counts(config.scheduler.max_rows), settings.max_draft_tokens
    multiprocessors = torch.cuda.get_device_properties(model.device).multi_processor_count
    uniform = takes_uniform_queries(load_flashinfer())
    width = -(-max_model_len // page)

    def attention(
        model: DecoderModel, queries: list[int], width: int, prefixes: Callable[[int], int] | None = None
    ) -> tuple[int, int]:
        heads = Heads(model.heads, model.kv_heads, model.head_dim)
        return captured_memory(heads, rows, queries, width, multiprocessors, uniform, prefixes)

    scratch = own = 0
    if model.num_kv_layers and not model.window:  # attention to windows is none of FlashInfer's
        prefixes = prefix_room if config.cache.prefix else None
        scratch, own = attention(model, [each + 1 for each in settings.captured_gammas], width, prefixes)
    for name, each in config.by_drafter.items():
        drafting, kv = _that_drafts(name, model, draft), each.speculation.kv
        if not drafting.num_kv_layers or drafting.window:
            continue
        narrow = kv.max_pages(page, gamma, width) * (drafting.num_kv_layers if kv.per_layer else 1)
        needed, drafts = attention(drafting, _draft_queries(settings.max_model_drafts), narrow)
        # Drafts are captured after the target, whose graphs keep the smaller memory that they were captured with.
        scratch += needed if needed > scratch else 0
        own += drafts
    return scratch + own


def measure(config: EngineConfig, model: DecoderModel) -> DeviceMemory:
    """Run the model once over as many tokens as a round can have, with as many logits as it can ask for."""
    device = model.device
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run_largest_round(config, model)
    torch.cuda.synchronize(device)
    running = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    return DeviceMemory(total, total - free, running)


@torch.inference_mode()
def run_largest_round(config: EngineConfig, model: DecoderModel) -> None:
    """Run the largest round there can be, over a temporary pool of its own."""
    tokens, page_size = config.scheduler.max_batch_tokens, config.cache.page_size
    tokens = min(tokens, model.max_positions)
    pages = -(-tokens // page_size)
    position = torch.arange(tokens, device=model.device)
    lists = torch.arange(pages, device=model.device)[None]
    num_logits = min(tokens, config.scheduler.max_rows * (config.speculation.max_draft_tokens + 1))
    inputs = ForwardBatch(
        torch.zeros_like(position),
        position,
        position,
        position,
        attention=AttentionBatch([tokens], [tokens], lists, window=model.window),
        logit_index=position[:num_logits],
        sliding_attention=AttentionBatch([tokens], [tokens], lists, window=model.sliding_window),
    )
    pool = model.make_pool(pages, page_size, config.cache.bits.written)
    attention, sliding = make_attention(model, page_size), None
    if model.num_sliding_layers:
        sliding_pool = model.make_sliding_pool(pages, page_size)
        sliding = SlidingKV(sliding_pool, model.ops.attention(page_size, model.head_dim))
    model.forward(inputs, pool, attention, sliding)
