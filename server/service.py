"""State shared by the routes: the model's tokenizer, the engine, and admission to it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar

from engine.config.deployment import Config
from engine.processes.supervisor import Supervisor
from models.default import resolve_model
from models.files.generation_defaults import GenerationDefaults, read_generation_defaults
from models.tokenizer import Tokenizer
from server.chat.response_store import ResponseStore
from server.errors import ApiError, draining, engine_dead, engine_restarting, unavailable
from server.limits import check_tokens
from server.observe.metrics import Metrics
from server.observe.tracing import Tracing
from server.text.answer_formats import choose_formats
from server.text.infilling import find_infilling
from server.text.template import ChatTemplate, Rendered
from server.version import build

logger = logging.getLogger(__name__)

_DURATION_WEIGHT = 0.05
"""Weight of the newest request in the moving average of request durations."""
_MAX_RETRY_AFTER_S = 30
_INLINE_LENGTH = 2048
"""Texts of more characters, or tokens, are converted off the event loop."""

_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")


async def run_by_length(
    length: int, function: Callable[_Args, _Result], *args: _Args.args, **kwargs: _Args.kwargs
) -> _Result:
    """Call `function`, in a thread if `length`, that of the text or tokens it converts, is large."""
    if length <= _INLINE_LENGTH:
        return function(*args, **kwargs)
    return await asyncio.to_thread(function, *args, **kwargs)


class Service:
    """One model and its engine. Use only from the event loop.

    client: None while the engine is loading. draining: set once the process must end; new requests are refused then.
    generation_defaults: of sampling parameters that a request leaves open. model_ids: names that clients may use;
    model_id: the first one. infilling: tokens for texts before a suffix; None: the tokenizer has none. tool_format,
    thinking: of the model. marks_of_calls, marks_of_thinking: tokens that are part of their texts; of thinking, their
    names by id. responses: those that later requests can continue. build: version and commit. tracing: None if it is
    off."""

    def __init__(self, config: Config, tokenizer: Tokenizer) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer, config.server.special_tokens_in_content)
        formats = config.server.thinking, config.server.tool_format
        self.thinking, self.tool_format = choose_formats(*formats, self.template.sources)
        self.marks_of_calls = tokenizer.ids_of(self.tool_format.markers)
        names = {tokenizer.id_of(name): name for name in self.thinking.marks}
        self.marks_of_thinking = {id: name for id, name in names.items() if id is not None}
        self.model_ids = config.server.served_model_name or [Path(config.engine.model).name]
        self.model_id = self.model_ids[0]
        self.infilling = find_infilling(tokenizer)
        self.created = int(time.time())
        self.generation_defaults = GenerationDefaults()
        if config.server.generation_config == "model":
            self.generation_defaults = read_generation_defaults(resolve_model(config.engine.model))
        if given := self.generation_defaults.given():
            text = ", ".join(f"{name} {value:g}" for name, value in given.items())
            logger.info("defaults of requests, from the model's generation_config.json: %s", text)
        self.client: Supervisor | None = None
        self.draining = asyncio.Event()
        settings = config.server
        self.responses = ResponseStore(
            settings.stored_responses, int(settings.stored_responses_mb * 2**20), settings.stored_responses_s
        )
        self.build = build()
        self.tracing = Tracing(self.model_id) if config.server.tracing else None
        self.metrics = Metrics(self.model_id, lambda: self.client.stats if self.client else None)
        self._admitted = self._admitted_tokens = 0
        self._mean_duration_s = 1.0  # typical duration of a request, waiting included
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def capacity(self) -> int:
        """Largest number of requests in the engine, running and waiting."""
        return self.config.engine.scheduler.max_rows + self.config.engine.scheduler.max_waiting

    def loaded(self) -> Supervisor:
        """Return the engine, for queries about it. Raises ApiError 503: loading, dead or restarting."""
        if self.client is None:
            raise unavailable("the model is still loading", "loading")
        self.check_alive()
        return self.client

    def check_alive(self) -> None:
        """Raise ApiError 503 if the engine is dead or restarting."""
        if self.client is not None and self.client.dead is not None:
            raise engine_dead(self.client.dead)
        if self.client is not None and self.client.down is not None:
            raise engine_restarting(self.client.down)

    def engine(self) -> Supervisor:
        """Return the engine, for a new request. Raises ApiError 503: loading, draining, dead or restarting."""
        client = self.loaded()
        if self.draining.is_set():
            raise draining()
        return client

    def check_model(self, model: str | None) -> None:
        if model is not None and model not in self.model_ids:
            raise ApiError(
                f"model: this server has no model {model[:64]!r}",
                status=404,
                code="model_not_found",
                param="model",
            )

    def check_count(self, prompts: int, choices: int) -> None:
        """Refuse more choices than the server can ever hold, before any work is done. Raises ApiError."""
        if prompts * choices > self.capacity:
            param = "n" if choices > 1 else "prompt"
            raise ApiError(
                f"{param}: {prompts * choices} choices in all, but the server takes {self.capacity}", param=param
            )

    @contextmanager
    def admit(self, requests: int, tokens: int) -> Iterator[Supervisor]:
        """Admit this many requests to the engine, with `tokens` prompt tokens in all, until the block ends. Raises
        ApiError 503 if there is no room for them."""
        client = self.engine()
        max_queued_tokens = self.config.server.max_queued_tokens
        if self._admitted + requests > self.capacity:
            raise unavailable("the queue is full", "queue_full", self._retry_after())
        # An idle server takes any request, however long its prompt.
        if max_queued_tokens is not None and self._admitted and self._admitted_tokens + tokens > max_queued_tokens:
            raise unavailable("the queue is full: max_queued_tokens is reached", "queue_full", self._retry_after())
        self._admitted += requests
        self._admitted_tokens += tokens
        self._idle.clear()
        began = time.monotonic()
        try:
            yield client
        finally:
            self._admitted -= requests
            self._admitted_tokens -= tokens
            self._mean_duration_s += _DURATION_WEIGHT * (time.monotonic() - began - self._mean_duration_s)
            if not self._admitted:
                self._idle.set()

    def _retry_after(self) -> int:
        """Estimate the seconds until half of the admitted requests have finished, at the present rate."""
        return max(1, min(_MAX_RETRY_AFTER_S, round(self._mean_duration_s / 2)))

    async def wait_idle(self) -> None:
        """Wait until no admitted request is left."""
        await self._idle.wait()

    async def encode(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        return await run_by_length(sum(map(len, texts)), self.tokenizer.encode_batch, texts, add_special_tokens)

    async def encode_chat(self, chat: Rendered, add_special_tokens: bool) -> list[int]:
        # In a thread, however short the text is: the first call loads another tokenizer.
        return await asyncio.to_thread(chat.encode, self.tokenizer, add_special_tokens)

    def truncate(self, prompt: list[int], keep: int | None, max_tokens: int | None, default: int) -> list[int]:
        """Return the last `keep` tokens of a prompt. None: all of them; -1: as many as leave room for `max_tokens`, or
        for `default` if that is None."""
        if keep == -1:
            keep = max(1, self.engine().ready.max_model_len - (default if max_tokens is None else max_tokens))
        return prompt if keep is None else prompt[-keep:]

    def fit(self, prompt: Sequence[int], max_tokens: int | None, default: int | None) -> int:
        """Return the largest number of tokens to generate. Raises ApiError: no tokens, unknown ones, or too many.

        max_tokens: as requested; None means `default`, or all there is room for.
        """
        ready = self.engine().ready
        if not prompt:
            raise ApiError("prompt: no tokens", code="invalid_value", param="prompt")
        check_tokens("prompt", prompt, ready.vocab_size)
        room = ready.max_model_len - len(prompt)
        if max_tokens is not None and self.config.server.clamp_max_tokens and room >= 1:
            max_tokens = min(max_tokens, room)
        wanted = min(room, default or room) if max_tokens is None else max_tokens
        if wanted > room or (max_tokens is None and room < 1):
            asked = "" if max_tokens is None else f" and {max_tokens} to generate"
            raise ApiError(
                f"the model takes {ready.max_model_len} tokens, but the prompt has {len(prompt)}{asked}",
                code="context_length_exceeded",
                param="prompt" if max_tokens is None or room < 1 else "max_tokens",
            )
        return wanted
