"""magicdec. Options: engine settings, {"engine.speculation.gamma": 0, …}. It uses the prefix cache where they say so
and where prompts are kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.offline.interleave import InterleavedController
from engine.config.deployment import EngineConfig, load_config
from engine.core import Engine
from engine.messages import AddRequest
from engine.params import SamplingParams
from engine.scheduler.controller import Controller
from engine.worker.resolve import resolve, threads_per_rank
from engine.worker.weight_choice import target_weights


class Peer:
    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings
        self._config = self._configure()
        self._engine: Engine | None = None
        self._controller = self._make_controller()
        self._controllers: dict[str, Controller] = {}
        self._waiting: set[int] = set()
        self._started = 0
        self._prompts: Sequence[Sequence[int]] = []
        self._temperature = 0.0
        self.mode = ""
        """Drafter of the next rounds, one of the settings' `modes`, or off; without such, as the config says."""
        self.max_batch = None
        gamma = self._config.speculation.gamma
        self.about = f"magicdec, {self._formats()}, gamma {gamma}, {threads_per_rank(self._config)} threads"
        if self._config.cache.format != "dense":
            self.about += f", {self._config.cache.format} KV"
        if self._config.cache.prefix:
            self.about += ", prefix cache"

    def _formats(self) -> str:
        """Describe the weights. Raises ConfigError, ModelError."""
        resolved = resolve(self._config, None, sizes_pool=False)
        chosen = target_weights(self._config, resolved.ops)
        dtype, own = str(resolved.dtype).removeprefix("torch."), chosen.own or "stored"
        said = f"{dtype} weights" if own == "dense" else f"{dtype}, {own} weights"
        return said if chosen.drafts is None else f"{said}, {chosen.drafts} drafts"

    def _configure(self) -> EngineConfig:
        """Build the engine's config. Raises ConfigError for invalid options."""
        own = {"engine.model": self._settings["model"], "engine.cache.prefix": self._settings["keep_prompts"]}
        if self._settings["threads"] is not None:
            own["engine.threads"] = self._settings["threads"]
        config = load_config(None, own | self._settings["options"]).engine
        rows, gamma = self._settings["rows"], config.speculation.max_draft_tokens
        # Room for the whole batch, so that no row's drafts are truncated for another's. The same for every point,
        # because a profile holds for one max_rows.
        tokens = max(rows * (gamma + 1) + 1, config.scheduler.max_batch_tokens)
        scheduler = config.scheduler.model_copy(update={"max_rows": rows, "max_batch_tokens": tokens})
        return config.model_copy(update={"scheduler": scheduler})

    def _make_controller(self) -> InterleavedController:
        speculation = self._config.speculation
        return InterleavedController(speculation.max_draft_tokens, model=speculation.max_model_drafts > 0)

    def _make_controllers(self) -> None:
        """Make the controller of the config, and one for each mode, which learns from its own rounds alone."""
        assert self._engine is not None
        modes = [mode for mode in self._settings["modes"] if mode != "off"]
        self._controllers = {"": self._engine.make_controller()}
        self._controllers |= {mode: self._engine.make_controller(mode) for mode in modes}

    def prepare(self, rows: int, row_tokens: int, temperature: float) -> None:
        self._temperature = temperature
        page, longest = self._config.cache.page_size, self._settings["row_tokens"]
        # Per row, its tokens and drafts, and one page that the scheduler keeps free.
        per_row = -(-(row_tokens + self._config.speculation.max_draft_tokens + 1) // page) + 1
        pages = max(rows * per_row, -(-longest // page) + 1)
        cache = self._config.cache.model_copy(update={"num_pages": pages})
        config = self._config.model_copy(update={"cache": cache, "max_model_len": longest})
        self._controller = self._make_controller()
        self._engine = Engine(config, controller=self._controller, progress=False)
        self._make_controllers()
        self._engine.profiler.fill()  # allocates the pool, which other engines have done by now

    def start(self, prompts: Sequence[Sequence[int]], limit: int, *, together: bool) -> None:
        """See driver.Peer.start. together: do not draft before all rows decode; until then, prefilled rows get a token
        per round."""
        assert self._engine is not None
        self._prompts = prompts
        self._started += 1
        for row, prompt in enumerate(prompts):
            params = SamplingParams(
                max_tokens=limit,
                temperature=self._temperature,
                seed=self._settings["seed"] + row,
                ignore_eos=True,
            )
            self._engine.add(AddRequest(self._id(row), list(prompt), params))
        self._waiting = set(range(len(prompts))) if together else set()

    def _id(self, row: int) -> str:
        """Name a row's request; otherwise than at earlier starts, since a controller must not know its text."""
        return f"{self._started}-{row}"

    def again(self, limit: int, temperature: float) -> None:
        assert self._engine is not None
        self._engine.abort([self._id(row) for row in range(len(self._prompts))])
        if temperature != self._temperature:  # what drafts are worth depends on it
            self._make_controllers()
        self._temperature = temperature
        self.start(self._prompts, limit, together=True)

    def step(self) -> list[tuple[int, list[int]]]:
        assert self._engine is not None
        if not self._engine.has_work():
            raise RuntimeError("all rows are at their end")
        self._controller.auto = self._controllers.get(self.mode, self._controllers[""])
        # auto: as that controller says
        self._controller.gamma = 0 if self._waiting or self.mode == "off" else "auto"
        outputs = self._engine.step()
        if failed := [output.error for output in outputs if output.error is not None]:
            raise RuntimeError(failed[0])
        yielded = [(int(output.id.partition("-")[2]), list(output.tokens)) for output in outputs]
        self._waiting -= {row for row, tokens in yielded if tokens}
        return yielded

    def stop(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()
