"""Random load with random faults, for any length of time: `python -m tests.support.chaos --minutes 10`.

Clients request streamed and whole completions of many lengths; some clients disconnect early. Meanwhile ranks are
killed, stopped and paused, also while they start. Every request must get either its completion, identical each time it
is sent, or a clear error. At the end no page, process, file or socket may be missing or left over. Prints a summary;
the exit status is 0 if all of that held.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.support.ranks import SERVED_MODEL, write_random_model
from tests.support.servers import PATIENCE_S, PLAIN, Server, start

CLIENTS = 8
BODIES = 40
"""Number of different requests; each is sent many times."""
CLEAR = {"engine_restarting", "queue_full"}
"""Error codes that a client may receive."""


def settings(ranks: int) -> dict[str, Any]:
    return {
        "engine": {
            "dtype": "float64",
            "tensor_parallel_size": ranks,
            "threads": 1,
            "step_timeout_s": 2.0,
            "start_timeout_s": 15.0,
            "check_invariants": True,
            "cache": {"page_size": 16, "num_pages": 256},
            "scheduler": {"max_rows": 4, "max_batch_tokens": 64, "max_waiting": 3},
            "speculation": {"gamma": 3, "kv": {"budget": 64}},
        },
        "server": {"restart": True, "restart_settled_s": 0.0, "start_timeout_s": 20.0},
    }


def body(number: int) -> dict[str, Any]:
    return {
        "prompt": [3 + (number * 31 + place) % 300 for place in range(1 + (number * 37) % 200)],
        "max_tokens": (1, 7, 40, 150, 600)[number % 5],
        "seed": number,
        "temperature": number % 3 / 2,
        "ignore_eos": True,
    }


@dataclass
class Summary:
    requests: Counter[str] = field(default_factory=Counter)
    """Number of requests by outcome."""
    faults: Counter[str] = field(default_factory=Counter)
    deadly: int = 0
    """Number of faults that are more than a pause: a rank is lost, so the engine must restart."""
    restarts: int = 0
    retried: int = 0
    seconds_down: list[float] = field(default_factory=list)
    """Duration of each period in which /ready did not return 200."""
    wrong: list[str] = field(default_factory=list)
    """Violations found."""

    def __str__(self) -> str:
        def listed(counts: Counter[str]) -> str:
            return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))

        down = self.seconds_down or [0.0]
        return "\n".join(
            (
                f"requests   {self.requests.total()}: {listed(self.requests)}",
                f"faults     {self.faults.total()}: {listed(self.faults)}",
                f"restarts   {self.restarts}; requests retried {self.retried}",
                f"not ready  {len(down)} times, {sum(down) / len(down):.1f} s on average, {max(down):.1f} s at most",
                f"wrong      {len(self.wrong)}",
                *(f"           {fault}" for fault in self.wrong[:20]),
            )
        )


class Chaos:
    """One chaos run against one server."""

    def __init__(self, server: Server, seed: int, calm_s: float) -> None:
        """calm_s: mean seconds between two faults."""
        self.summary = Summary()
        self._server = server
        self._calm_s = calm_s
        self._chance = random.Random(seed)
        self._texts: dict[int, str] = {}
        self._seen: set[psutil.Process] = set()
        self._over = False

    async def run(self, seconds: float) -> Summary:
        """Run for this long, or until the first deadly fault if that comes later."""
        before = await self._held()
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self._server.url, limits=limits, **PLAIN) as http:
            clients = [asyncio.create_task(self._client(http)) for _ in range(CLIENTS)]
            watcher = asyncio.create_task(self._watch(http))
            faults = asyncio.create_task(self._faults(http))
            await asyncio.sleep(seconds)
            while not self.summary.deadly:
                await self._ready(http)
                await self._strike("SIGKILL")
            self._over = True
            await asyncio.gather(faults, *clients)
            await self._ready(http)
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)
        await asyncio.to_thread(self._settle, before)
        return self.summary

    # -- load ----------------------------------------------------------------------------------------------------------

    async def _client(self, http: httpx.AsyncClient) -> None:
        while not self._over:
            number = self._chance.randrange(BODIES)
            way = self._chance.choice((self._whole, self._stream, self._stream, self._vanish))
            try:
                end = await way(http, number)
            except httpx.HTTPError as error:
                end = "broken"
                self._wrong(f"request {number}: {type(error).__name__}: {error}")
            self.summary.requests[end] += 1
            if end in CLEAR:
                await asyncio.sleep(self._chance.uniform(0.1, 0.6))

    async def _whole(self, http: httpx.AsyncClient, number: int) -> str:
        answer = await http.post("/v1/completions", json=body(number))
        if answer.status_code != 200:
            return self._error(number, answer.status_code, answer.json(), "retry-after" in answer.headers)
        choice = answer.json()["choices"][0]
        return self._answered(number, choice["text"], choice["finish_reason"])

    async def _stream(self, http: httpx.AsyncClient, number: int) -> str:
        text, reason, ended = "", None, False
        async for chunk in self._chunks(http, number):
            if isinstance(chunk, str):
                return chunk
            if chunk is None:
                ended = True
            elif "error" in chunk:
                return self._error(number, 503, chunk, True)
            else:
                text += chunk["choices"][0]["text"]
                reason = chunk["choices"][0]["finish_reason"] or reason
        if not ended:
            self._wrong(f"request {number}: the stream just ended")
        return self._answered(number, text, reason)

    async def _vanish(self, http: httpx.AsyncClient, number: int) -> str:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._chance.uniform(0, 1)):
                async for chunk in self._chunks(http, number):
                    if isinstance(chunk, str):
                        return chunk
        return "vanished"

    async def _chunks(self, http: httpx.AsyncClient, number: int) -> AsyncIterator[Any]:
        """Yield the chunks of a stream and None at its end, or, if the request was refused, one string: the error
        code."""
        async with http.stream("POST", "/v1/completions", json={**body(number), "stream": True}) as answer:
            if answer.status_code != 200:
                await answer.aread()
                yield self._error(number, answer.status_code, answer.json(), "retry-after" in answer.headers)
                return
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    yield None
                elif line.startswith("data: "):
                    yield json.loads(line.removeprefix("data: "))

    def _answered(self, number: int, text: str, reason: str | None) -> str:
        if reason != "length":
            self._wrong(f"request {number}: finish_reason {reason}")
        if self._texts.setdefault(number, text) != text:
            self._wrong(f"request {number}: another text than before")
        return "answered"

    def _error(self, number: int, status: int, answer: Any, again: bool) -> str:
        code: str = answer["error"]["code"]
        if status != 503 or code not in CLEAR or not again or not answer["error"]["message"]:
            self._wrong(f"request {number}: status {status}, {answer}")
        return code

    # -- faults --------------------------------------------------------------------------------------------------------

    async def _faults(self, http: httpx.AsyncClient) -> None:
        while not self._over:
            await asyncio.sleep(self._chance.expovariate(1 / self._calm_s))
            if self._chance.random() < 0.8:
                await self._ready(http)
            for _ in range(1 if self._chance.random() < 0.85 else 2):
                await self._strike()

    async def _strike(self, what: str | None = None) -> None:
        everyone = self._server.everyone()
        self._seen.update(everyone)
        if self._over or not everyone:
            return
        victim = self._chance.choice(everyone)
        what = what or self._chance.choices(("SIGKILL", "SIGSTOP", "SIGTERM", "pause"), (4, 3, 1, 1))[0]
        with contextlib.suppress(psutil.NoSuchProcess):
            who = "rank 0" if victim.ppid() == self._server.process.pid else "another rank"
            if what == "pause":
                victim.suspend()
                await asyncio.sleep(0.3)
                victim.resume()
            else:
                victim.send_signal(signal.Signals[what])
                self.summary.deadly += 1
            self.summary.faults[f"{what} of {who}"] += 1

    async def _ready(self, http: httpx.AsyncClient) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while (await http.get("/ready")).status_code != 200:
            if time.monotonic() > deadline:
                health = (await http.get("/health")).text
                raise AssertionError(f"the server does not come back: {health}")
            await asyncio.sleep(0.1)

    async def _watch(self, http: httpx.AsyncClient) -> None:
        """Record how long the server is not ready, each time."""
        gone: float | None = None
        while True:
            ready = (await http.get("/ready")).status_code == 200
            if not ready and gone is None:
                gone = time.monotonic()
            elif ready and gone is not None:
                self.summary.seconds_down.append(time.monotonic() - gone)
                gone = None
            await asyncio.sleep(0.1)

    # -- the end -------------------------------------------------------------------------------------------------------

    async def _held(self) -> tuple[int, int]:
        return len(self._server.everyone()), self._server.files()

    def _settle(self, before: tuple[int, int]) -> None:
        """Wait until the server holds what it held at the start (a last fault may still be pending), then stop it."""
        server = self._server
        deadline = time.monotonic() + PATIENCE_S
        now: Any = None
        while time.monotonic() < deadline:
            if server.get("/ready").status_code == 200:
                now = (len(server.everyone()), server.files())
                if server.idle() and now == before and len(list(server.tmp.iterdir())) == 1:
                    break
            time.sleep(0.2)
        else:
            left = [path.name for path in server.tmp.iterdir()]
            self._wrong(f"not as in the beginning: processes and files {now}, not {before}; {left}; {server.load()}")
        self.summary.restarts = int(server.metric("magicdec_engine_restarts_total"))
        self.summary.retried = int(server.metric("magicdec_requests_retried_total"))
        server.family = [*self._seen, *server.everyone()]
        server.signal(signal.SIGTERM)
        if (status := server.wait()) != 0:
            self._wrong(f"exit status {status}")

    def _wrong(self, what: str) -> None:
        self.summary.wrong.append(what)


def run(seconds: float, *, seed: int, ranks: int = 2, calm_s: float = 3.0) -> Summary:
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        place = Path(name)
        model = write_random_model(place / "model", SERVED_MODEL)
        server = start(place, model, config=settings(ranks))
        try:
            return asyncio.run(Chaos(server, seed, calm_s).run(seconds))
        except BaseException:
            print(server.log.read_text()[-5000:], file=sys.stderr)
            raise
        finally:
            server.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=2)
    arguments = parser.parse_args()
    summary = run(arguments.minutes * 60, seed=arguments.seed, ranks=arguments.ranks)
    print(summary)
    return 1 if summary.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
