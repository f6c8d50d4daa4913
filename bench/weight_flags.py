"""The flags --weights and --draft-weights, for benches that have their own command line."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any, get_args

from engine.config.deployment import EngineConfig
from engine.config.speculation import SpeculationConfig


@dataclass(frozen=True, slots=True)
class WeightFlags:
    """Values of engine.weights and engine.speculation.weights."""

    weights: str = "auto"
    draft_weights: str = "auto"

    def apply(self, config: EngineConfig) -> EngineConfig:
        """Return `config` with these weights."""
        speculation = config.speculation.model_copy(update={"weights": self.draft_weights})
        return config.model_copy(update={"weights": self.weights, "speculation": speculation})

    def missing(self, formats: frozenset[str]) -> list[str]:
        """Return the formats that were asked for and are not among `formats`."""
        return sorted({self.weights, self.draft_weights} - {"auto", "same"} - formats)


AUTO_WEIGHTS = WeightFlags()


def add_weight_flags(parser: argparse.ArgumentParser, *, drafts: bool = True) -> None:
    """Add the flags. drafts: whether the bench drafts."""
    parser.add_argument("--weights", choices=_values(EngineConfig), default="auto", help="see engine.weights")
    if drafts:
        parser.add_argument(
            "--draft-weights", choices=_values(SpeculationConfig), default="auto", help="see engine.speculation.weights"
        )


def read_weight_flags(arguments: argparse.Namespace) -> WeightFlags:
    """Read the values of `add_weight_flags`."""
    return WeightFlags(arguments.weights, getattr(arguments, "draft_weights", "auto"))


def _values(settings: type[EngineConfig | SpeculationConfig]) -> tuple[Any, ...]:
    return get_args(settings.model_fields["weights"].annotation)
