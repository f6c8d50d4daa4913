"""Models with sliding layers: which of them keep all KV, and what is not served."""

from __future__ import annotations

from dataclasses import replace

from engine.config.deployment import ConfigError, EngineConfig
from engine.config.kv import WindowConfig
from models.model_config import ModelConfig


def grouped(config: EngineConfig, target: ModelConfig) -> ModelConfig:
    """Return the target's config with the attention groups that it is served with. Where all layers slide, they keep
    the KV of a window only, unless something reads more of it (SpeculationConfig.needs_all_kv)."""
    return replace(target, keeps_all_kv=target.all_slide and config.speculation.needs_all_kv(config.cache.format))


def check_sliding(config: EngineConfig, target: ModelConfig, draft: ModelConfig | None) -> None:
    """Raise ConfigError for settings that models with sliding layers do not support. draft: a draft model's config."""
    settings = config.speculation
    if target.sliding_layers and config.target_kv is not None:
        raise ConfigError(
            f"engine.target_kv: it chooses from the KV of all tokens, but {len(target.sliding_layers)} of the model's "
            f"{target.num_layers} layers slide"
        )
    if draft is not None and draft.mixes_layers:
        raise ConfigError(
            f"engine.speculation.model: {len(draft.sliding_layers)} of its {draft.num_layers} layers slide, which a "
            "draft model's must not; use --draft self"
        )
    for name, each in config.by_drafter.items():
        drafting = target if draft is None or name == "self" else draft
        kv, setting = each.speculation.kv, f"engine.{settings.kv_setting(name)}"
        if kv.counts_votes and drafting.all_slide:
            raise ConfigError(
                f"{setting}: {kv.policy} chooses by what all KV is read for, but all layers of the model slide"
            )
        kinds = {drafting.rope_of(layer) for layer in range(drafting.num_layers)}
        if isinstance(kv, WindowConfig) and kv.positions == "relative" and len(kinds) > 1:
            raise ConfigError(
                f"{setting}.positions: relative needs one rotary embedding, but the model's layers have {len(kinds)}"
            )
