"""What is not served for models with sliding layers."""

from __future__ import annotations

import logging

from engine.config.deployment import ConfigError, EngineConfig
from engine.config.kv import WindowConfig
from engine.scheduler.sliding_pages import num_sliding_pages
from models.model_config import ModelConfig

log = logging.getLogger(__name__)


def check_sliding(config: EngineConfig, target: ModelConfig, draft: ModelConfig | None) -> None:
    """Raise ConfigError for settings that models with sliding layers do not support. draft: a draft model's config."""
    settings = config.speculation
    if target.sliding_layers and config.target_kv is not None:
        raise ConfigError(
            f"engine.target_kv: it chooses from the KV of all tokens, but {len(target.sliding_layers)} of the model's "
            f"{target.num_layers} layers slide"
        )
    if draft is not None and draft.attention_groups[1]:
        raise ConfigError(
            f"engine.speculation.model: {len(draft.sliding_layers)} of its {draft.num_layers} layers slide, which a "
            "draft model's must not; use --draft self"
        )
    if not settings.max_model_drafts:
        return
    drafting = target if draft is None else draft
    kv = settings.kv
    if kv.counts_votes and drafting.sliding_layers and not drafting.attention_groups[1]:
        raise ConfigError(
            f"engine.speculation.kv: {kv.policy} chooses by what all KV is read for, but all layers of the model slide"
        )
    kinds = {drafting.rope_of(layer) for layer in range(drafting.num_layers)}
    if isinstance(kv, WindowConfig) and kv.positions == "relative" and len(kinds) > 1:
        raise ConfigError(
            "engine.speculation.kv.positions: relative needs one rotary embedding, but the model's layers have "
            f"{len(kinds)}"
        )


def log_sliding(config: EngineConfig, shape: ModelConfig, num_pages: int) -> None:
    """Log the pool of sliding layers, if there is one. num_pages: of the pool of the other layers."""
    if window := shape.windows[1]:
        log.info(
            "%d of %d layers keep the KV of %d tokens per request, in a pool of %d pages",
            len(shape.sliding_layers),
            shape.num_layers,
            window,
            num_sliding_pages(config, window, num_pages),
        )
