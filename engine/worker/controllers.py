"""Build what decides on drafts, the controller and the search of text, and count what is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from engine.config.deployment import ConfigError, EngineConfig
from engine.control.auto import AutoGamma
from engine.control.step_times import StepTimes
from engine.ngram.ngram_drafts import NgramDrafts
from engine.ngram.text_store import StoreError, TextStore, fingerprint
from engine.scheduler.controller import Controller, FixedGamma
from engine.scheduler.request_ngrams import CountAllowed, RequestNgrams
from engine.worker.profiler import Profiler, load_profile, profile, profile_key, save_profile
from engine.worker.resolve import Resolved
from engine.worker.worker import Worker
from models.config import ModelConfig


def make_controller(config: EngineConfig, resolved: Resolved, worker: Worker, profiler: Profiler) -> Controller:
    """Make the controller that the config describes. It may measure rounds, so there must be no requests. worker: rank
    0's."""
    if (speculation := config.speculation).gamma != "auto":
        return FixedGamma(speculation.gamma, model=speculation.max_model_drafts > 0)
    key = profile_key(config, resolved, worker.weight_formats, worker.weight_bytes)
    if (samples := load_profile(key)) is None:
        samples = profile(profiler, config)
        save_profile(key, samples)
    times = StepTimes(samples, draft_tokens_read(config), drafts_share=speculation.drafts_share)
    budgets = speculation.kv_budgets(config.cache.page_size) or [0]
    return AutoGamma(
        times,
        speculation.max_model_drafts,
        budgets,
        speculation.kv.budget,
        speculation.max_text_drafts,
        reads_latest=speculation.max_model_drafts > 0 and speculation.kv.reads_latest,
    )


def make_request_ngrams(config: EngineConfig, resolved: Resolved, count_allowed: CountAllowed) -> RequestNgrams | None:
    """Make the search of text for drafts, if the config says so. count_allowed: what grammars of rows allow. Raises
    ConfigError for a text store that cannot be used."""
    speculation = config.speculation
    if not speculation.searches_text:
        return None
    store = None
    if speculation.store is not None:
        try:
            store = TextStore(Path(speculation.store).expanduser(), fingerprint(resolved.path / "tokenizer.json"))
        except (StoreError, OSError) as error:
            raise ConfigError(f"engine.speculation.store: {error}") from error
    drafts = NgramDrafts(resolved.shape.vocab_size, store)
    return RequestNgrams(drafts, speculation.max_text_drafts, count_allowed)


def draft_tokens_read(config: EngineConfig) -> Callable[[int, int], int]:
    """Return a function from a row's tokens and a budget to the KV slots that a draft step reads; budget 0: the
    configured one."""
    speculation, page_size = config.speculation, config.cache.page_size
    kinds = {budget: speculation.kv.with_budget(budget) for budget in speculation.kv_budgets(page_size)}
    kinds[0] = speculation.kv
    return lambda context, budget: kinds[budget].tokens_read(context, page_size)


def target_tokens_read(config: EngineConfig, shape: ModelConfig) -> Callable[[int, int, int], int] | None:
    """Return a function from a row's prompt tokens, a position and a number of queries to the KV slots that a pass of a
    target with target_kv reads; None without it."""
    target, page_size = config.target_kv, config.cache.page_size
    if target is None:
        return None
    heads = shape.num_layers * shape.num_kv_heads
    streaming = heads // 2 / heads if target.heads else 0.0
    return lambda num_prompt, first, queries: target.tokens_read_by_pass(
        num_prompt, first, queries, page_size, streaming
    )
