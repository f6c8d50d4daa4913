"""Build what decides on drafts, the controller and the search of text, and count what is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from engine.config.deployment import ConfigError, EngineConfig
from engine.config.speculation import SpeculationConfig
from engine.control.auto import AutoGamma
from engine.control.drafting_model import DraftingModel
from engine.control.step_times import StepTimes
from engine.ngram.ngram_drafts import NgramDrafts
from engine.ngram.text_store import StoreError, TextStore, fingerprint
from engine.plan import DrafterName
from engine.scheduler.controller import Controller, DraftReads, FixedGamma
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
    reads, models = draft_reads(config), []
    for name, settings in _by_plan_name(config).items():
        times = StepTimes(samples, reads[name].tokens_read, drafts_share=reads[name].share, drafter=name)
        budgets = settings.kv_budgets(config.cache.page_size) or [0]
        latest = settings.max_model_drafts > 0 and settings.kv.reads_latest
        models.append(DraftingModel(times, budgets, settings.kv.budget, name=name, reads_latest=latest))
    return AutoGamma(models, speculation.max_model_drafts, speculation.max_text_drafts)


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


def _by_plan_name(config: EngineConfig) -> dict[DrafterName | None, SpeculationConfig]:
    """Return the settings of each model that drafts, by RoundPlan.drafter; where none does, as if one did."""
    names: tuple[DrafterName | None, ...] = (None, "self")
    found = [each.speculation for each in config.by_drafter.values()] or [config.speculation]
    return dict(zip(names, found, strict=False))


def draft_reads(config: EngineConfig) -> dict[DrafterName | None, DraftReads]:
    """Describe the KV that each model's drafts read, by RoundPlan.drafter."""
    return {name: _reads(each, config.cache.page_size) for name, each in _by_plan_name(config).items()}


def _reads(settings: SpeculationConfig, page_size: int) -> DraftReads:
    kinds = {budget: settings.kv.with_budget(budget) for budget in settings.kv_budgets(page_size)} | {0: settings.kv}
    return DraftReads(lambda context, budget: kinds[budget].tokens_read(context, page_size), settings.drafts_share)


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
