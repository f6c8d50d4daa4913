"""What the routes share: the model's tokenizer, the engine, and who may use it now."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from engine.config.deployment import Config
from engine.processes.supervisor import Supervisor
from models.tokenizer import Tokenizer
from server.errors import ApiError, draining, engine_dead, engine_restarting, unavailable
from server.limits import check_tokens
from server.observe.metrics import Metrics
from server.observe.tracing import Tracing
from server.text.template import ChatTemplate
from server.version import build

_TYPICAL_RATE = 0.05
"""What one request changes of how long requests are taken to take."""
_MOST_RETRY_S = 30
_INLINE_CHARS = 2048
"""More text than this is tokenized off the event loop."""


class Service:
    """One model behind one engine. Used from the event loop only.

    client: None while the engine is loading.
    draining: set once the process has been asked to end; nothing new is taken then.
    build: which version this is. tracing: None if it is off.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer)
        self.model_id = config.server.served_model_name or Path(config.engine.model).name
        self.created = int(time.time())
        self.client: Supervisor | None = None
        self.draining = asyncio.Event()
        self.build = build()
        self.tracing = Tracing(self.model_id) if config.server.tracing else None
        self.metrics = Metrics(self.model_id, lambda: self.client.stats if self.client else None)
        self._admitted = self._admitted_tokens = 0
        self._typical_s = 1.0  # of a request, waiting included
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def capacity(self) -> int:
        """Most requests to the engine at once, running and waiting."""
        return self.config.engine.scheduler.max_rows + self.config.engine.scheduler.max_waiting

    def loaded(self) -> Supervisor:
        """The engine, to ask about it. Raises ApiError 503: loading, dead or restarting."""
        if self.client is None:
            raise unavailable("the model is still loading", "loading")
        self.check_alive()
        return self.client

    def check_alive(self) -> None:
        """Raises ApiError 503 if the engine is gone, for good or not."""
        if self.client is not None and self.client.dead is not None:
            raise engine_dead(self.client.dead)
        if self.client is not None and self.client.down is not None:
            raise engine_restarting(self.client.down)

    def engine(self) -> Supervisor:
        """The engine, for a new request. Raises ApiError 503: loading, draining, dead or restarting."""
        client = self.loaded()
        if self.draining.is_set():
            raise draining()
        return client

    def check_model(self, model: str | None) -> None:
        if model is not None and model != self.model_id:
            raise ApiError(
                f"model: this server has no model {model[:64]!r}",
                status=404,
                code="model_not_found",
                param="model",
            )

    def check_count(self, prompts: int, choices: int) -> None:
        """Refuse what could never be taken, before any work goes into it. Raises ApiError."""
        if prompts * choices > self.capacity:
            param = "n" if choices > 1 else "prompt"
            raise ApiError(
                f"{param}: {prompts * choices} choices in all, but the server takes {self.capacity}", param=param
            )

    @contextmanager
    def admit(self, requests: int, tokens: int) -> Iterator[Supervisor]:
        """Hold places for this many requests to the engine, with so many prompt tokens. Raises ApiError 503 if there
        are not as many."""
        client = self.engine()
        most = self.config.server.max_queued_tokens
        if self._admitted + requests > self.capacity:
            raise unavailable("the queue is full", "queue_full", self._retry_after())
        # Whoever comes to an idle server is served, however long the prompt is.
        if most is not None and self._admitted and self._admitted_tokens + tokens > most:
            raise unavailable("the queue holds as many tokens as it may", "queue_full", self._retry_after())
        self._admitted += requests
        self._admitted_tokens += tokens
        self._idle.clear()
        began = time.monotonic()
        try:
            yield client
        finally:
            self._admitted -= requests
            self._admitted_tokens -= tokens
            self._typical_s += _TYPICAL_RATE * (time.monotonic() - began - self._typical_s)
            if not self._admitted:
                self._idle.set()

    def _retry_after(self) -> int:
        """Seconds after which half of those who are here will have gone, at the present rate."""
        return max(1, min(_MOST_RETRY_S, round(self._typical_s / 2)))

    async def wait_idle(self) -> None:
        """Return once no admitted request is left."""
        await self._idle.wait()

    async def encode(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        if sum(map(len, texts)) <= _INLINE_CHARS:
            return self.tokenizer.encode_batch(texts, add_special_tokens)
        return await asyncio.to_thread(self.tokenizer.encode_batch, texts, add_special_tokens)

    def fit(self, prompt: Sequence[int], max_tokens: int | None, default: int | None) -> int:
        """How many tokens to generate at most. Raises ApiError: no tokens, unknown ones, or too many.

        max_tokens: what was asked for; None means `default`, or all there is room for.
        """
        ready = self.engine().ready
        if not prompt:
            raise ApiError("prompt: no tokens", code="invalid_value", param="prompt")
        check_tokens("prompt", prompt, ready.vocab_size)
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
