"""Log what an engine runs with."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from engine.config.deployment import EngineConfig
from engine.scheduler.sliding_pages import pool_pages
from engine.worker.resolve import Resolved
from models.model_config import ModelConfig

log = logging.getLogger(__name__)


def log_started(config: EngineConfig, resolved: Resolved, num_pages: int, weights: Mapping[str, str]) -> None:
    """Log what an engine runs with. weights: see EngineStats."""
    own, drafts = weights["target"], weights.get("drafts", weights["target"])
    kv_gb = num_pages * config.cache.page_size * resolved.kv_token_bytes / 1e9
    size = config.tensor_parallel_size
    log.info(
        "%s in %s on %s, kernels %s, weights %s, KV pool of %d pages (%.2f GB), %s: %d bytes per token",
        resolved.path.name,
        str(resolved.dtype).removeprefix("torch."),
        f"{size} × {resolved.device.type}" if size > 1 else str(resolved.device),
        resolved.ops.name,
        own if drafts == own else f"{own}, drafts {drafts}",
        num_pages,
        kv_gb,
        config.cache.format,
        resolved.kv_token_bytes,
    )
    _log_sliding(config, resolved.shape, num_pages, resolved.max_model_len)
    if (target := config.target_kv) is not None:
        log.warning(
            "target_kv: the target reads at most %d KV tokens in each KV head for a position after a prompt (%s); "
            "its text differs from the dense model's",
            target.most_read(config.cache.page_size),
            ", ".join(f"{name} {value}" for name, value in target.summary.items()),
        )


def _log_sliding(config: EngineConfig, shape: ModelConfig, num_pages: int, max_model_len: int) -> None:
    """Log the pool of sliding layers, if there is one, or that they keep all KV. num_pages: see pool_pages."""
    if window := shape.windows[1]:
        pages = pool_pages(config, shape, num_pages, max_model_len).sliding
        log.info(
            "%d of %d layers keep the KV of %d tokens per request, in a pool of %d pages",
            len(shape.sliding_layers),
            shape.num_layers,
            window,
            pages,
        )
    elif shape.all_slide:
        log.info(
            "all layers read a window of %d tokens, but keep all KV, as its format or the reading of drafts needs it",
            shape.windows[0],
        )
