"""Send a load over HTTP with streaming answers, and record times and outcome of each request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import aiohttp
import msgspec

from bench.serving.load import Arrivals, Item, arrival_times

Fate = Literal["answered", "refused", "failed", "timed out", "broken off"]
"""Outcome of a request. answered: complete. refused: status 429 or 503, for lack of room. failed: any other error from
the server. timed out: not complete within the timeout. broken off: the connection failed or ended early."""


@dataclass(slots=True)
class RequestRecord:
    """Times and outcome of one request. Times in seconds of time.perf_counter().

    due: scheduled send time. sent: actual send time. chunks: arrival of each chunk with text. ended: end of the answer.
    prompt_tokens, tokens: prompt and output tokens by the server's count. reason: error message, if any.
    """

    due: float
    sent: float = 0.0
    chunks: list[float] = field(default_factory=list)
    ended: float = 0.0
    prompt_tokens: int = 0
    tokens: int = 0
    fate: Fate = "broken off"
    reason: str = ""

    @property
    def first_s(self) -> float:
        return self.chunks[0] - self.due

    @property
    def per_token_s(self) -> float | None:
        """Mean seconds per token after the first; a chunk can have several tokens. None with fewer than two."""
        return (self.chunks[-1] - self.chunks[0]) / (self.tokens - 1) if self.tokens > 1 else None

    @property
    def gaps_s(self) -> list[float]:
        """Seconds between chunks."""
        return [b - a for a, b in zip(self.chunks, self.chunks[1:], strict=False)]

    @property
    def whole_s(self) -> float:
        return self.ended - self.due


@dataclass(frozen=True, slots=True)
class Target:
    """The server to load. url: without /v1. key: API key. body: additional fields of every request."""

    url: str
    model: str | None = None
    key: str | None = None
    timeout_s: float = 600.0
    body: dict[str, Any] = field(default_factory=dict)

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.key is None else {"Authorization": f"Bearer {self.key}"}


class LoadClient:
    """Client that sends one load. done: called after each request ends."""

    def __init__(self, target: Target, done: Callable[[], None] = lambda: None) -> None:
        self._target = target
        self._done = done

    async def at_rate(self, items: Sequence[Item], rate: float, arrivals: Arrivals, seed: int) -> list[RequestRecord]:
        """Run an open loop: send each request when it is due, regardless of the number in flight."""
        async with self._session() as session:
            began = time.perf_counter()
            tasks = []
            for item, at in zip(items, arrival_times(arrivals, rate, seed), strict=False):
                due = began + at
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                tasks.append(asyncio.create_task(self._ask(session, item, due)))
            return list(await asyncio.gather(*tasks))

    async def at_concurrency(self, items: Sequence[Item], concurrency: int) -> list[RequestRecord]:
        """Run a closed loop: keep `concurrency` requests in flight."""
        left = list(enumerate(items))[::-1]
        records: dict[int, RequestRecord] = {}
        async with self._session() as session:

            async def user() -> None:
                while left:
                    number, item = left.pop()
                    records[number] = await self._ask(session, item, time.perf_counter())

            await asyncio.gather(*(user() for _ in range(min(concurrency, len(items)))))
        return [records[number] for number in range(len(items))]

    def _session(self) -> aiohttp.ClientSession:
        timeout = aiohttp.ClientTimeout(total=self._target.timeout_s)
        connector = aiohttp.TCPConnector(limit=0)
        return aiohttp.ClientSession(headers=self._target.headers, timeout=timeout, connector=connector)

    async def _ask(self, session: aiohttp.ClientSession, item: Item, due: float) -> RequestRecord:
        record = RequestRecord(due, time.perf_counter())
        body = {
            "prompt": item.prompt,
            "max_tokens": item.output,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({} if self._target.model is None else {"model": self._target.model}),
            **self._target.body,
        }
        try:
            async with session.post(f"{self._target.url}/v1/completions", json=body) as answer:
                if answer.status != 200:
                    record.fate = "refused" if answer.status in (429, 503) else "failed"
                    record.reason = f"{answer.status} {(await answer.text())[:200]}"
                else:
                    await self._read(answer, record)
        except TimeoutError:
            record.fate = "timed out"
        except aiohttp.ClientError as error:
            record.reason = f"{type(error).__name__}: {error}"
        record.ended = time.perf_counter()
        self._done()
        return record

    async def _read(self, answer: aiohttp.ClientResponse, record: RequestRecord) -> None:
        async for line in answer.content:
            if not line.startswith(b"data:"):
                continue
            now, data = time.perf_counter(), line[5:].strip()
            if data == b"[DONE]":
                if record.fate != "failed":
                    record.fate = "answered"
                return
            chunk: dict[str, Any] = msgspec.json.decode(data)
            if "error" in chunk:
                record.fate, record.reason = "failed", str(chunk["error"])[:200]
            if any(choice.get("text") for choice in chunk.get("choices", ())):
                record.chunks.append(now)
            if usage := chunk.get("usage"):
                record.prompt_tokens, record.tokens = usage["prompt_tokens"], usage["completion_tokens"]


async def list_model(target: Target) -> str:
    """Return the id of the served model. Raises aiohttp.ClientError, TimeoutError, LookupError."""
    async with (
        aiohttp.ClientSession(headers=target.headers, timeout=aiohttp.ClientTimeout(total=30)) as session,
        session.get(f"{target.url}/v1/models", raise_for_status=True) as answer,
    ):
        models = await answer.json()
    found: str = models["data"][0]["id"]
    return found
