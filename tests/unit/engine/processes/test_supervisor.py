"""Engine restarts: outcome of requests, running totals, and an engine that does not start again."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import cast

import psutil
import pytest

from engine.config.deployment import EngineConfig
from engine.messages import AddRequest, EngineStats, Ready, RequestOutput
from engine.params import SamplingParams
from engine.processes.client import EngineClient, EngineDead
from engine.processes.supervisor import MAX_FAILED_STARTS, EngineDown, Supervisor
from tests.support.fake_engine import COMMAND, SLOW, expected


class Puppet:
    """Stand-in for EngineClient; the test controls its outputs and its death."""

    def __init__(self) -> None:
        self.dead: str | None = None
        self.ready = Ready("puppet", 64, 320, [2], EngineStats())
        self.stats = EngineStats(rounds=10, pages_total=5, pages_free=3, pages_cached=2, running=1, prefix_hits=7)
        self.stats.accepted_per_position = [2, 1]
        self.requests: dict[str, asyncio.Queue[RequestOutput | None]] = {}
        self.closed = False
        self.resets = 0
        self._death = asyncio.Event()

    @property
    def live(self) -> int:
        return len(self.requests)

    async def generate(self, request: AddRequest) -> AsyncGenerator[RequestOutput, None]:
        if self.dead is not None:
            raise EngineDead(self.dead)
        queue = self.requests[request.id] = asyncio.Queue()
        try:
            while (output := await queue.get()) is not None:
                yield output
                if output.finish_reason is not None:
                    return
            raise EngineDead(self.dead)
        finally:
            del self.requests[request.id]

    def reset_prefix_cache(self) -> None:
        self.resets += 1

    async def asked(self, *ids: str) -> None:
        while set(self.requests) != set(ids):
            await asyncio.sleep(0)

    def say(self, id: str, tokens: list[int], finish_reason: str | None = None) -> None:
        self.requests[id].put_nowait(RequestOutput(id, tokens, finish_reason=finish_reason))

    def acknowledge(self, id: str) -> None:
        self.requests[id].put_nowait(RequestOutput(id, queued=True))

    def abort(self, ids: Iterable[str]) -> None:
        for id in ids:
            if id in self.requests:
                self.say(id, [], "abort")

    def abort_all(self) -> None:
        self.abort(list(self.requests))

    def die(self, reason: str) -> None:
        self.dead = reason
        self._death.set()
        for queue in self.requests.values():
            queue.put_nowait(None)

    async def wait_dead(self) -> str:
        await self._death.wait()
        assert self.dead is not None
        return self.dead

    async def close(self) -> None:
        self.closed = True
        if self.dead is None:
            self.die("the engine was stopped")


class Puppets:
    """Factory of puppets. fail: message with which starts fail. open: cleared to make starts wait."""

    def __init__(self) -> None:
        self.made: list[Puppet] = []
        self.starts = 0
        self.fail: str | None = None
        self.open = asyncio.Event()
        self.open.set()

    async def __call__(self) -> EngineClient:
        self.starts += 1
        await self.open.wait()
        if self.fail is not None:
            raise EngineDead(self.fail)
        self.made.append(Puppet())
        return cast(EngineClient, self.made[-1])

    async def up(self, number: int) -> Puppet:
        while len(self.made) < number:
            await asyncio.sleep(0)
        return self.made[number - 1]


@asynccontextmanager
async def supervised(*, restart: bool = True, settled_s: float = 0) -> AsyncIterator[tuple[Supervisor, Puppets]]:
    async with asyncio.timeout(30):
        puppets = Puppets()
        engines = await Supervisor.start(puppets, restart=restart, settled_s=settled_s)
        try:
            yield engines, puppets
        finally:
            await engines.close()
        assert all(puppet.closed for puppet in puppets.made)


@pytest.fixture
def no_backoff(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Make sleeps return at once; the list receives their durations."""
    waits: list[float] = []
    sleep = asyncio.sleep

    async def listed(seconds: float) -> None:
        if seconds:
            waits.append(seconds)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", listed)
    return waits


def ask(engines: Supervisor, id: str) -> asyncio.Task[list[int]]:
    """Start a task that collects the tokens of a request, followed by -1 if the request ends with "abort"."""

    async def tokens() -> list[int]:
        got: list[int] = []
        async for output in engines.generate(AddRequest(id, [1], SamplingParams())):
            got += output.tokens
            if output.finish_reason == "abort":
                got.append(-1)
        return got

    return asyncio.create_task(tokens())


def test_without_restart_death_is_the_end() -> None:
    async def main() -> None:
        async with supervised(restart=False) as (engines, puppets):
            request = ask(engines, "r")
            await puppets.made[0].asked("r")
            assert (engines.live, engines.dead, engines.down) == (1, None, None)
            puppets.made[0].die("it broke")
            with pytest.raises(EngineDead, match="it broke") as error:
                await request
            assert not isinstance(error.value, EngineDown)
            assert (engines.dead, engines.down) == ("it broke", None)
            assert await engines.wait_dead() == "it broke"
            with pytest.raises(EngineDead):
                await ask(engines, "late")
            assert puppets.starts == 1

    asyncio.run(main())


def test_what_becomes_of_requests() -> None:
    """A request that has yielded tokens ends, one that has not runs again, and one that arrives meanwhile is
    refused."""

    async def main() -> None:
        async with supervised() as (engines, puppets):
            begun, queued = ask(engines, "begun"), ask(engines, "queued")
            await puppets.made[0].asked("begun", "queued")
            for id in ("begun", "queued"):
                puppets.made[0].acknowledge(id)
            puppets.made[0].say("begun", [7])
            await asyncio.sleep(0.01)
            puppets.open.clear()
            puppets.made[0].die("it broke")
            with pytest.raises(EngineDown, match="it broke"):
                await begun
            with pytest.raises(EngineDown, match="it broke"):
                await ask(engines, "new")
            assert (engines.dead, engines.down, engines.live) == (None, "it broke", 1)
            assert not queued.done()
            puppets.open.set()
            second = await puppets.up(2)
            await second.asked("queued")
            assert engines.down is None
            second.acknowledge("queued")
            second.say("queued", [8, 9], "stop")
            assert await queued == [8, 9]
            fresh = ask(engines, "fresh")
            await second.asked("fresh")
            second.say("fresh", [4], "stop")
            assert await fresh == [4]
            assert (engines.stats.engine_restarts, engines.stats.requests_retried) == (1, 1)
            assert puppets.made[0].closed

    asyncio.run(main())


def test_a_request_that_kills_engines_is_retried_once() -> None:
    async def main() -> None:
        async with supervised() as (engines, puppets):
            request = ask(engines, "r")
            for number in (1, 2):
                puppet = await puppets.up(number)
                await puppet.asked("r")
                puppet.die(f"death {number}")
            with pytest.raises(EngineDown, match="death 2"):
                await request
            third = await puppets.up(3)
            assert third.live == 0
            assert engines.stats.requests_retried == 1

    asyncio.run(main())


@pytest.mark.parametrize("how", ["abort", "abort_all", "leave", "close"])
def test_a_request_that_waits_for_an_engine_can_end(how: str) -> None:
    async def main() -> None:
        async with supervised() as (engines, puppets):
            request = ask(engines, "r")
            await puppets.made[0].asked("r")
            puppets.open.clear()
            puppets.made[0].die("it broke")
            while not engines.stats.waiting:
                await asyncio.sleep(0)
            assert engines.live == 1
            if how == "abort":
                engines.abort(["r", "unknown"])
            elif how == "abort_all":
                engines.abort_all()
            elif how == "leave":
                request.cancel()
            else:
                await engines.close()
            (end,) = await asyncio.gather(request, return_exceptions=True)
            if how.startswith("abort"):
                assert end == [-1]
            else:
                assert isinstance(end, asyncio.CancelledError if how == "leave" else EngineDead)
            assert engines.live == 0
            puppets.open.set()
            if how != "close":
                assert (await puppets.up(2)).live == 0
            assert engines.stats.requests_retried == 0

    asyncio.run(main())


def test_starts_that_fail_are_the_end(no_backoff: list[float]) -> None:
    async def main() -> None:
        async with supervised() as (engines, puppets):
            request = ask(engines, "r")
            await puppets.made[0].asked("r")
            puppets.fail = "no memory"
            puppets.made[0].die("it broke")
            reason = await engines.wait_dead()
            assert reason == engines.dead == "it broke; then: no memory (5 starts in a row have failed)"
            assert engines.down is None
            with pytest.raises(EngineDead, match="no memory") as error:
                await request
            assert not isinstance(error.value, EngineDown)
            assert puppets.starts == 1 + MAX_FAILED_STARTS
            assert no_backoff == [1, 2, 4, 8]

    asyncio.run(main())


def test_a_crash_loop_ends(no_backoff: list[float]) -> None:
    """An engine that dies right after its start counts as a failed start."""

    async def main() -> None:
        async with supervised(settled_s=1000) as (engines, puppets):
            for number in range(1, MAX_FAILED_STARTS + 1):
                (await puppets.up(number)).die(f"death {number}")
            assert await engines.wait_dead() == "death 5 (5 starts in a row have failed)"
            assert no_backoff == [1, 2, 4, 8]

    asyncio.run(main())


def test_an_engine_that_lived_makes_up_for_failures(no_backoff: list[float]) -> None:
    async def main() -> None:
        async with supervised(settled_s=0) as (engines, puppets):
            for number in range(1, 3 * MAX_FAILED_STARTS):
                (await puppets.up(number)).die(f"death {number}")
                await puppets.up(number + 1)
            assert engines.dead is None
            assert no_backoff == []

    asyncio.run(main())


def test_a_first_engine_that_does_not_come_up() -> None:
    async def main() -> None:
        puppets = Puppets()
        puppets.fail = "no such model"
        with pytest.raises(EngineDead, match="no such model"):
            await Supervisor.start(puppets, restart=True, settled_s=0)
        assert puppets.starts == 1

    asyncio.run(main())


@pytest.mark.parametrize("restart", [True, False])
def test_a_reset_needs_an_engine(restart: bool) -> None:
    async def main() -> None:
        async with supervised(restart=restart) as (engines, puppets):
            engines.reset_prefix_cache()
            puppets.open.clear()
            puppets.made[0].die("it broke")
            with pytest.raises(EngineDead, match="it broke") as caught:
                engines.reset_prefix_cache()
            assert isinstance(caught.value, EngineDown) is restart
            if restart:
                puppets.open.set()
                second = await puppets.up(2)
                while engines.down:
                    await asyncio.sleep(0)
                engines.reset_prefix_cache()
                assert second.resets == 1
            assert puppets.made[0].resets == 1

    asyncio.run(main())


def test_totals_go_on_and_gauges_are_of_this_engine() -> None:
    async def main() -> None:
        async with supervised() as (engines, puppets):
            puppets.open.clear()
            puppets.made[0].die("it broke")
            while puppets.starts == 1:
                await asyncio.sleep(0)
            stats = engines.stats
            assert (stats.rounds, stats.running, stats.pages_total, stats.pages_free) == (10, 0, 0, 0)
            assert (stats.pages_cached, stats.prefix_hits) == (0, 7)
            puppets.open.set()
            second = await puppets.up(2)
            while engines.down:
                await asyncio.sleep(0)
            assert (engines.stats.rounds, engines.stats.pages_total, engines.stats.running) == (20, 5, 1)
            assert (engines.stats.pages_cached, engines.stats.prefix_hits) == (2, 14)
            second.stats = EngineStats(rounds=11, accepted_per_position=[1, 1, 1])
            assert engines.stats.rounds == 21
            assert engines.stats.accepted_per_position == [3, 2, 1]

    asyncio.run(main())


async def exhausted(outputs: AsyncGenerator[RequestOutput, None]) -> None:
    async for _ in outputs:
        pass


def test_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over real engine processes: no process and no file remains."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    seen: list[EngineClient] = []

    async def start() -> EngineClient:
        seen.append(
            await EngineClient.start(EngineConfig(model="fake"), start_timeout_s=30, timeout_s=30, command=COMMAND)
        )
        return seen[-1]

    async def main() -> None:
        async with asyncio.timeout(60):
            engines = await Supervisor.start(start, restart=True, settled_s=0)
            slow = AddRequest("slow", [SLOW], SamplingParams(max_tokens=10_000))
            async with aclosing(engines.generate(slow)) as outputs:
                assert (await anext(outputs)).queued
                await anext(outputs)
                os.kill(seen[0].pid, signal.SIGKILL)
                with pytest.raises(EngineDown, match="status -9"):
                    await exhausted(outputs)
            while engines.down:
                await asyncio.sleep(0.01)
            wanted = AddRequest("r", [1], SamplingParams(max_tokens=9))
            assert [token async for output in engines.generate(wanted) for token in output.tokens] == expected(wanted)
            assert not psutil.pid_exists(seen[0].pid)
            assert len(list(tmp_path.iterdir())) == 1
            await engines.close()
        assert not psutil.pid_exists(seen[1].pid)
        assert list(tmp_path.iterdir()) == []

    asyncio.run(main())
