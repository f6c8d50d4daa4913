"""Send a load over HTTP with streaming answers, and record times and outcome of each request."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import aiohttp
import msgspec

from bench.serving.load import Arrivals, Job, UserCall, arrival_times

Fate = Literal["answered", "refused", "failed", "timed out", "broken off"]
"""Outcome of a request. answered: complete. refused: status 429 or 503, for lack of room. failed: any other error from
the server. timed out: not complete within the timeout. broken off: the connection failed or ended early."""


@dataclass(slots=True)
class RequestRecord:
    """Times and outcome of one request. Times in seconds of time.perf_counter().

    due: scheduled send time. sent: actual send time. chunks: arrival of each chunk with text. ended: end of the answer.
    prompt_tokens, tokens: prompt and output tokens by the server's count. reason: error message, if any. turn: its
    number in its conversation, from 1. cached_tokens: prompt tokens that the server found in its prefix cache; None if
    it does not say. text: the answer.
    """

    due: float
    sent: float = 0.0
    chunks: list[float] = field(default_factory=list)
    ended: float = 0.0
    prompt_tokens: int = 0
    tokens: int = 0
    fate: Fate = "broken off"
    reason: str = ""
    turn: int = 1
    cached_tokens: int | None = None
    text: str = ""

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

    async def at_rate(self, jobs: Sequence[Job], rate: float, arrivals: Arrivals, seed: int) -> list[RequestRecord]:
        """Run an open loop: begin each job when it is due, regardless of the number in flight."""
        async with self._session() as session:
            began = time.perf_counter()
            tasks = []
            for job, at in zip(jobs, arrival_times(arrivals, rate, seed), strict=False):
                due = began + at
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                tasks.append(asyncio.create_task(self._serve(session, job, due)))
            return [record for records in await asyncio.gather(*tasks) for record in records]

    async def at_concurrency(self, jobs: Sequence[Job], concurrency: int) -> list[RequestRecord]:
        """Run a closed loop: keep `concurrency` jobs in flight."""
        left = list(enumerate(jobs))[::-1]
        records: dict[int, list[RequestRecord]] = {}
        async with self._session() as session:

            async def user() -> None:
                while left:
                    number, job = left.pop()
                    records[number] = await self._serve(session, job, time.perf_counter())

            await asyncio.gather(*(user() for _ in range(min(concurrency, len(jobs)))))
        return [record for number in range(len(jobs)) for record in records[number]]

    def _session(self) -> aiohttp.ClientSession:
        timeout = aiohttp.ClientTimeout(total=self._target.timeout_s)
        connector = aiohttp.TCPConnector(limit=0)
        return aiohttp.ClientSession(headers=self._target.headers, timeout=timeout, connector=connector)

    async def _serve(self, session: aiohttp.ClientSession, job: Job, due: float) -> list[RequestRecord]:
        """Send the calls of a job, each when the user has thought about the answer before. One without an answer is
        the last."""
        records: list[RequestRecord] = []
        calls = job.calls()
        call = next(calls)
        while True:
            record = await self._ask(session, call, due)
            records.append(record)
            if record.fate != "answered":
                return records
            try:
                call = calls.send(record.text)
            except StopIteration:
                return records
            due = record.ended + call.pause_s
            await asyncio.sleep(max(0.0, due - time.perf_counter()))

    async def _ask(self, session: aiohttp.ClientSession, call: UserCall, due: float) -> RequestRecord:
        record = RequestRecord(due, time.perf_counter(), turn=call.turn)
        body = {
            **call.body,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({} if self._target.model is None else {"model": self._target.model}),
            **self._target.body,
        }
        try:
            async with session.post(self._target.url + call.path, json=body) as answer:
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
            text = "".join(_text_of(choice) for choice in chunk.get("choices", ()))
            if text:
                record.chunks.append(now)
                record.text += text
            if usage := chunk.get("usage"):
                record.prompt_tokens, record.tokens = usage["prompt_tokens"], usage["completion_tokens"]
                record.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")


def _text_of(choice: dict[str, Any]) -> str:
    """Return the new text of a choice, of a completion or a chat."""
    return choice.get("text") or (choice.get("delta") or {}).get("content") or ""


@dataclass(frozen=True, slots=True)
class PrefixCounts:
    """A server's totals since it started. queries: prompt tokens looked up in its prefix cache. hits: those found."""

    queries: float
    hits: float


async def read_prefix_counts(target: Target) -> PrefixCounts | None:
    """Read the counters of the prefix cache from the server's metrics, which have vLLM's names. None without them."""
    timeout = aiohttp.ClientTimeout(total=30)
    try:
        async with (
            aiohttp.ClientSession(headers=target.headers, timeout=timeout) as session,
            session.get(f"{target.url}/metrics", raise_for_status=True) as answer,
        ):
            text = await answer.text()
    except (aiohttp.ClientError, TimeoutError):
        return None
    sums = []
    for name in ("queries", "hits"):
        # One line per model and engine, as `name{labels} value`.
        values = re.findall(rf"^vllm:prefix_cache_{name}_total(?:{{.*}})? (\S+)", text, re.MULTILINE)
        if not values:
            return None
        sums.append(sum(map(float, values)))
    return PrefixCounts(*sums)


async def list_model(target: Target) -> str:
    """Return the id of the served model. Raises aiohttp.ClientError, TimeoutError, LookupError."""
    async with (
        aiohttp.ClientSession(headers=target.headers, timeout=aiohttp.ClientTimeout(total=30)) as session,
        session.get(f"{target.url}/v1/models", raise_for_status=True) as answer,
    ):
        models = await answer.json()
    found: str = models["data"][0]["id"]
    return found
