"""The flags --weights, --draft-weights and --kv-format, for benches that have their own command line, and what these do
about settings that cannot be."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import ValidationError

from engine.config.deployment import CacheConfig, ConfigError, EngineConfig, describe
from engine.config.settings import Settings
from engine.config.speculation import SpeculationConfig
from kernels.kv.kv_bits import KV_BITS


@dataclass(frozen=True, slots=True)
class FormatFlags:
    """Values of engine.weights, engine.speculation.weights and engine.cache.format."""

    weights: str = "auto"
    draft_weights: str = "auto"
    kv: str = "dense"

    def apply(self, config: EngineConfig) -> EngineConfig:
        """Return `config` with these formats, and with the page size that its KV must have. Raises ConfigError for
        settings that do not fit that."""
        fields = config.model_dump()
        fields["weights"], fields["speculation"]["weights"] = self.weights, self.draft_weights
        fields["cache"] |= {"format": self.kv, "page_size": KV_BITS[self.kv].page_size(config.cache.page_size)}
        try:
            return EngineConfig.model_validate(fields)
        except ValidationError as error:
            raise ConfigError(describe(error)) from None

    def missing(self, formats: frozenset[str]) -> list[str]:
        """Return the formats of weights that were asked for and are not among `formats`."""
        return sorted({self.weights, self.draft_weights} - {"auto", "same"} - formats)


USUAL_FORMATS = FormatFlags()


def add_format_flags(parser: argparse.ArgumentParser, *, drafts: bool = True, kv: bool = True) -> None:
    """Add the flags. drafts: whether the bench drafts. kv: whether it runs with KV of any format."""
    choices = _values(EngineConfig, "weights")
    parser.add_argument("--weights", choices=choices, default="auto", help="see engine.weights")
    if drafts:
        choices = _values(SpeculationConfig, "weights")
        parser.add_argument("--draft-weights", choices=choices, default="auto", help="see engine.speculation.weights")
    if kv:
        choices = _values(CacheConfig, "format")
        parser.add_argument("--kv-format", choices=choices, default="dense", help="see engine.cache.format")


def read_format_flags(arguments: argparse.Namespace) -> FormatFlags:
    """Read the values of `add_format_flags`."""
    given = vars(arguments)
    return FormatFlags(arguments.weights, given.get("draft_weights", "auto"), given.get("kv_format", "dense"))


@contextmanager
def exits_on_error() -> Iterator[None]:
    """Print `error: …` and exit with status 1 where settings, a model or a file cannot be used: no traceback. For the
    `main` of a bench."""
    try:
        yield
    except ValidationError as error:
        sys.exit(f"error: {describe(error)}")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def _values(settings: type[Settings], name: str) -> tuple[Any, ...]:
    return get_args(settings.model_fields[name].annotation)
