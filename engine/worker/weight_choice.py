"""Formats of a deployment's weight matrices: as settings choose them, and as loaded models have them."""

from __future__ import annotations

from collections.abc import Sequence

from engine.config.deployment import EngineConfig
from kernels.ops import Ops
from models.decoder import DecoderModel
from parallel.matrix_layer import WeightChoice


def target_weights(config: EngineConfig, ops: Ops) -> WeightChoice:
    """Return the formats of the target, which has a second set of matrices where it drafts with weights of its own."""
    own = None if config.weights == "auto" else config.weights
    if "self" not in config.by_drafter:
        return WeightChoice(own)
    drafts = _draft_format(config, ops)
    return WeightChoice(own, None if drafts == own else drafts)


def draft_model_weights(config: EngineConfig, ops: Ops) -> WeightChoice:
    """Return the formats of a separate draft model."""
    return WeightChoice(_draft_format(config, ops))


def _draft_format(config: EngineConfig, ops: Ops) -> str | None:
    """Return the format that drafts multiply in; None: that of their model's matrices."""
    wanted = config.speculation.weights
    if wanted == "auto":
        return ops.fastest_format(config.scheduler.max_rows)
    return None if wanted == "same" else wanted


def settle_draft_format(config: EngineConfig, ops: Ops) -> EngineConfig:
    """Return the settings with the format of drafts by name: rank 0 measures, and all ranks have the same."""
    speculation = config.speculation.model_copy(update={"weights": _draft_format(config, ops) or "same"})
    return config.model_copy(update={"speculation": speculation})


def loaded_formats(model: DecoderModel) -> set[str | None]:
    """Return the formats that `engine.weights` may name for a loaded model: the one that it was loaded with, and that
    of all its matrices, if they have one in common."""
    found = set(model.matrix_formats)
    return {model.weights.own, *(found if len(found) == 1 else ())}


def describe_formats(target: DecoderModel, drafting: Sequence[DecoderModel]) -> dict[str, str]:
    """Describe the formats in which models multiply, the most frequent first. drafting: the models of drafts."""
    formats = {"target": _describe(target)}
    if drafting:
        formats["drafts"] = ", ".join(dict.fromkeys(_describe(model) for model in drafting))
    return formats


def _describe(model: DecoderModel) -> str:
    formats = " and ".join(name for name, _ in model.matrix_formats.most_common())
    return f"{formats} (as stored)" if model.weights.own is None and formats != "dense" else formats
