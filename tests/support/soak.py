"""A long run of every kind of request: `python -m tests.support.soak --minutes 60`.

The default model serves streamed and whole completions, chats, several choices, grammars, log-probabilities and stop
strings, for short and long prompts; one client in five disconnects early. Every request must get the same completion
each time it is sent, and memory, threads, files and pages must not grow. Prints the resources in use every minute; the
exit status is 0 if all of that held.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import pydoc_data.topics
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import psutil

from models.default import resolve_model
from tests.support.servers import PATIENCE_S, Server, start

CLIENTS = 12
BODIES = 70
"""Number of different requests; each is sent many times."""
GROWTH = 0.02
"""Largest relative growth of memory, from the middle third of the run to the last, that counts as noise."""
TEXT = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
SETTINGS: dict[str, Any] = {"engine": {"check_invariants": True, "cache": {"memory_gb": 1}}}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "year": {"type": "integer"}},
    "required": ["name", "year"],
    "additionalProperties": False,
}


def body(number: int) -> tuple[str, dict[str, Any]]:
    """Build request `number`: its route and its body."""
    chance = random.Random(number)
    at, length = chance.randrange(len(TEXT) - 20_000), chance.choice((20, 300, 2_000, 6_000, 16_000))
    wanted: dict[str, Any] = {
        "max_tokens": chance.choice((5, 8, 40, 120)),
        "seed": number,
        "temperature": chance.choice((0, 0, 0.7, 1)),
        "stream": bool(number % 2),
    }
    kind = number % 7
    if kind in (1, 2):
        schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}} if kind == 1 else None
        ask = f"Who is this about?\n{TEXT[at : at + length // 4]}"
        return "/v1/chat/completions", wanted | {
            "messages": [{"role": "user", "content": ask}],
            "response_format": schema,
        }
    extra: list[dict[str, Any]] = [
        {},
        {},
        {},
        {"n": 3},
        {"logprobs": 3},
        {"stop": ["the", "\n\n"], "ignore_eos": True},
        {"top_p": 0.9, "frequency_penalty": 0.5, "presence_penalty": 0.2, "min_tokens": 5},
    ]
    return "/v1/completions", wanted | {"prompt": TEXT[at : at + length]} | extra[kind]


def text_of(answer: dict[str, Any]) -> dict[int, str]:
    """Text that a response, or a chunk of a stream, adds to each choice, by index."""
    found = {}
    for choice in answer["choices"]:
        said = choice.get("text")
        if said is None:
            said = (choice.get("message") or choice.get("delta"))["content"]
        found[choice["index"]] = said or ""
    return found


@dataclass(frozen=True, slots=True)
class Held:
    """Resources in use at one moment. memory: resident bytes of the API process and all engine processes together."""

    minute: float
    memory: int
    threads: int
    files: int
    answered: int


@dataclass
class Soak:
    """One soak run against one server."""

    server: Server
    chance: random.Random
    ends: Counter[str] = field(default_factory=Counter)
    texts: dict[int, dict[int, str]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    held: list[Held] = field(default_factory=list)
    over: bool = False

    async def run(self, minutes: float) -> None:
        began = time.monotonic()
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(
            base_url=self.server.url, timeout=PATIENCE_S * 5, limits=limits, verify=False
        ) as http:
            clients = [asyncio.create_task(self._client(http)) for _ in range(CLIENTS)]
            while (passed := time.monotonic() - began) < minutes * 60:
                self._look(passed / 60)
                await asyncio.sleep(min(60.0, minutes * 60 - passed))
            self.over = True
            await asyncio.gather(*clients)
        await asyncio.to_thread(self._settle)
        self._look((time.monotonic() - began) / 60)

    async def _client(self, http: httpx.AsyncClient) -> None:
        while not self.over:
            number = self.chance.randrange(BODIES)
            asked = asyncio.create_task(self._ask(http, number))
            if self.chance.random() < 0.2:
                await asyncio.wait({asked}, timeout=self.chance.uniform(0, 3))
                asked.cancel()
            try:
                self.ends[await asked] += 1
            except asyncio.CancelledError:
                self.ends["vanished"] += 1
            except Exception as error:
                self.wrong.append(f"request {number}: {type(error).__name__}: {error}")

    async def _ask(self, http: httpx.AsyncClient, number: int) -> str:
        route, wanted = body(number)
        text: dict[int, str] = {}
        async with http.stream("POST", route, json=wanted) as answer:
            if answer.status_code != 200:
                await answer.aread()
                self.wrong.append(f"request {number}: {answer.status_code} {answer.text[:200]}")
                return "refused"
            if wanted["stream"]:
                async for line in answer.aiter_lines():
                    if line.startswith("data: {"):
                        for index, more in text_of(json.loads(line.removeprefix("data: "))).items():
                            text[index] = text.get(index, "") + more
            else:
                await answer.aread()
                text = text_of(answer.json())
        if self.texts.setdefault(number, text) != text:
            self.wrong.append(f"request {number}: another text than before")
        return "answered"

    def _look(self, minute: float) -> None:
        processes = [psutil.Process(self.server.process.pid), *self.server.everyone()]
        self.held.append(
            Held(
                minute,
                sum(process.memory_info().rss for process in processes),
                sum(process.num_threads() for process in processes),
                self.server.files(),
                self.ends["answered"],
            )
        )
        self.server.get("/metrics").raise_for_status()
        print(f"{minute:5.1f} min {self.held[-1].memory / 1e6:8.0f} MB", self.ends, flush=True)

    def _settle(self) -> None:
        """Wait until nothing is left of the requests."""
        deadline, before, files = time.monotonic() + PATIENCE_S, self.held[0].files, -1
        while not (self.server.idle() and (files := self.server.files()) <= before):
            if time.monotonic() > deadline:
                self.wrong.append(f"left over: {self.server.load()}, {files} open files, {before} before")
                return
            time.sleep(0.2)

    def judge(self) -> None:
        """Compare the last third of the run with the middle one; the first third is left out because some memory grows
        only once."""
        third = len(self.held) // 3
        if third < 3:
            return
        middle, last = (
            median(each.memory for each in part) for part in (self.held[third : 2 * third], self.held[2 * third :])
        )
        print(f"memory: {middle / 1e6:.0f} MB in the middle third, {last / 1e6:.0f} MB in the last")
        if last > middle * (1 + GROWTH):
            self.wrong.append("memory grows")
        if self.held[-1].threads > self.held[third].threads:
            self.wrong.append(f"{self.held[-1].threads} threads, {self.held[third].threads} before")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        server = start(Path(name), resolve_model("default"), config=SETTINGS)
        try:
            soak = Soak(server, random.Random(arguments.seed))
            asyncio.run(soak.run(arguments.minutes))
            soak.judge()
        except BaseException:
            print(server.log.read_text()[-5000:], file=sys.stderr)
            raise
        finally:
            server.stop()
    print(f"{soak.ends.total()} requests: {dict(soak.ends)}; {len(soak.wrong)} wrong", *soak.wrong[:20], sep="\n")
    return 1 if soak.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
