"""An engine on the CPU with rows to run rounds over, without requests."""

from __future__ import annotations

from collections.abc import Callable

from bench.format_flags import USUAL_FORMATS, FormatFlags
from engine.config.deployment import EngineConfig
from engine.core import Engine
from engine.plan import RoundPlan, RoundResult, RowWork
from engine.scheduler.controller import FixedGamma
from engine.worker.profiler import blank_rows
from engine.worker.resolve import resolve
from engine.worker.weight_choice import target_weights
from kernels.ops import Ops
from models.decoder import DecoderModel
from models.loader import load_model
from parallel.group import Group


def cpu_config(model: str, rows: int, gamma: int, formats: FormatFlags = USUAL_FORMATS) -> EngineConfig:
    """Build the config of an engine on the CPU, without a prefix cache; everything else as by default. Raises
    ConfigError."""
    config = EngineConfig.model_validate(
        {
            "model": model,
            "device": "cpu",
            "cache": {"prefix": False},  # every prompt is computed whole
            "scheduler": {"max_rows": rows},
            "speculation": {"gamma": gamma},
        }
    )
    return formats.apply(config)


def load_with_ops(config: EngineConfig, wrap: Callable[[Ops], Ops]) -> DecoderModel:
    """Load the config's model, with its kernels wrapped. Raises ConfigError, ModelError."""
    sizes = resolve(config, None)
    ops = wrap(sizes.ops)
    return load_model(
        sizes.path,
        dtype=sizes.dtype,
        device=sizes.device,
        group=Group.single(),
        progress=False,
        ops=ops,
        weights=target_weights(config, ops),
    )


class BlankRounds:
    """Rounds of rows that all decode.

    Rows have pages of their own, filled with zeros: times depend on shapes and on the contents of CPU caches.
    """

    def __init__(
        self, config: EngineConfig, rows: int, context: int, gamma: int, rounds: int, model: DecoderModel | None = None
    ) -> None:
        """Start the engine, and run a first round. context: tokens per row; up to gamma less where the KV format limits
        drafts. rounds: how often `step` will be called before a restart, at most. model: used instead of the config's.
        Raises ConfigError, ModelError."""
        self.engine = Engine(config, model=model, controller=FixedGamma(gamma), progress=False)
        page = config.cache.page_size
        context -= gamma - config.cache.bits.max_drafts(context + 1, gamma)
        width = (context + rounds * (gamma + 1) + 64) // page + 1
        sliding = self.engine.profiler.sliding_pages
        self._starts, pages = blank_rows(rows, context, width, rows * width, sliding=sliding)
        self._work = [RowWork(row, context, 1, gamma, True) for row in range(rows)]
        self.engine.profiler.run(RoundPlan(0, self._starts, pages, self._work, clear=list(range(rows * width))))

    def restart(self) -> None:
        """Run a round with rows of the first length again."""
        self.engine.profiler.run(RoundPlan(0, self._starts, [], self._work))

    def step(self) -> RoundResult:
        return self.engine.profiler.run(RoundPlan(0, [], [], self._work))

    def close(self) -> None:
        self.engine.close()
