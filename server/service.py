"""What the routes share: the model's tokenizer, the engine, and who may use it now."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from engine.client import EngineClient
from engine.config import Config
from models.tokenizer import Tokenizer
from server.errors import ApiError, engine_dead, unavailable
from server.metrics import Metrics
from server.template import ChatTemplate

_INLINE_CHARS = 2048
"""Text longer than this is tokenized off the event loop."""


class Service:
    """One model behind one engine. Used from the event loop only.

    client: None while the engine is loading.
    draining: True once the process has been asked to end; nothing new is taken then.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer)
        self.model_id = config.server.served_model_name or Path(config.engine.model).name
        self.created = int(time.time())
        self.client: EngineClient | None = None
        self.draining = False
        self.metrics = Metrics(self.model_id, lambda: self.client.stats if self.client else None)
        self._admitted = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def capacity(self) -> int:
        """Most requests to the engine at once, running and waiting."""
        return self.config.engine.scheduler.max_rows + self.config.engine.scheduler.max_waiting

    def loaded(self) -> EngineClient:
        """The engine, to ask about it. Raises ApiError 503: loading or dead."""
        if self.client is None:
            raise unavailable("the model is still loading", "loading")
        if self.client.dead is not None:
            raise engine_dead(self.client.dead)
        return self.client

    def engine(self) -> EngineClient:
        """The engine, for a new request. Raises ApiError 503: loading, draining or dead."""
        client = self.loaded()
        if self.draining:
            raise unavailable("the server is shutting down", "draining")
        return client

    def check_model(self, model: str | None) -> None:
        if model is not None and model != self.model_id:
            raise ApiError(
                f"model: this server has no model {model[:64]!r}",
                status=404,
                code="model_not_found",
                param="model",
            )

    def check_count(self, requests: int) -> None:
        """Refuse what could never be taken, before any work goes into it. Raises ApiError."""
        if requests > self.capacity:
            raise ApiError(f"n: {requests} choices in all, but the server takes {self.capacity}", param="n")

    @contextmanager
    def admit(self, requests: int) -> Iterator[EngineClient]:
        """Hold places for this many requests to the engine. Raises ApiError 503 if there are not as many."""
        client = self.engine()
        if self._admitted + requests > self.capacity:
            raise unavailable("the queue is full", "queue_full")
        self._admitted += requests
        self._idle.clear()
        try:
            yield client
        finally:
            self._admitted -= requests
            if not self._admitted:
                self._idle.set()

    async def wait_idle(self) -> None:
        """Return once no admitted request is left."""
        await self._idle.wait()

    async def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        if len(text) <= _INLINE_CHARS:
            return self.tokenizer.encode(text, add_special_tokens)
        return await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens)

    def fit(self, prompt: Sequence[int], max_tokens: int | None, default: int | None) -> int:
        """How many tokens to generate at most. Raises ApiError: no tokens, unknown ones, or too many.

        max_tokens: what was asked for; None means `default`, or all there is room for.
        """
        ready = self.engine().ready
        if not prompt:
            raise ApiError("prompt: no tokens", code="invalid_value", param="prompt")
        if min(prompt) < 0 or max(prompt) >= ready.vocab_size:
            unknown = next(token for token in prompt if not 0 <= token < ready.vocab_size)
            raise ApiError(
                f"prompt: the model has no token {unknown}, only 0 to {ready.vocab_size - 1}", param="prompt"
            )
        room = ready.max_model_len - len(prompt)
        wanted = min(room, default or room) if max_tokens is None else max_tokens
        if wanted > room or (max_tokens is None and room < 1):
            asked = "" if max_tokens is None else f" and {max_tokens} to generate"
            raise ApiError(
                f"the model takes {ready.max_model_len} tokens, but the prompt has {len(prompt)}{asked}",
                code="context_length_exceeded",
                param="prompt" if max_tokens is None or room < 1 else "max_tokens",
            )
        return wanted
