"""EngineClient and the engine process, over a FakeEngine."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import aclosing
from pathlib import Path
from typing import Any

import psutil
import pytest

from engine.config.deployment import EngineConfig
from engine.messages import RequestOutput
from engine.processes.client import EngineClient, EngineDead
from engine.processes.heartbeat import BEAT_S, MISSED_BEATS
from tests.support import fake_engine
from tests.support.clients import collect, eventually, run, started, tokens_of
from tests.support.fake_engine import (
    COMMAND,
    COMPILE_S,
    CRASH,
    EXIT,
    FULL,
    HANG,
    PAGES,
    REFUSE,
    SLOW,
    expected,
    request,
)

pytestmark = pytest.mark.usefixtures("own_tmp")


def test_requests_get_their_own_tokens() -> None:
    async def test(client: EngineClient) -> None:
        assert client.ready.vocab_size == fake_engine.VOCAB
        requests = [request([number], max_tokens=number, seed=number) for number in range(1, 40)]
        got = await asyncio.gather(*(tokens_of(client, wanted) for wanted in requests))
        assert got == [expected(wanted) for wanted in requests]
        assert client.live == 0

    run(test)


def test_the_first_output_says_that_it_is_queued_and_the_last_why_it_ended() -> None:
    async def test(client: EngineClient) -> None:
        outputs = [output async for output in client.generate(request([5], max_tokens=7))]
        assert [output.finish_reason for output in outputs] == [None, None, None, "length"]
        assert [output.queued for output in outputs] == [True, False, False, False]
        assert outputs[0] == RequestOutput(outputs[0].id, queued=True)

    run(test)


def test_a_refused_request_gets_an_answer_and_others_go_on() -> None:
    async def test(client: EngineClient) -> None:
        wanted = request([1], max_tokens=20)
        (refused,), (full,), tokens = await asyncio.gather(
            collect(client, request([REFUSE])), collect(client, request([FULL])), tokens_of(client, wanted)
        )
        assert (refused.error, refused.retry, refused.finish_reason) == ("not this one", None, "abort")
        assert (full.error, full.retry) == ("too many are waiting", "queue_full")
        assert tokens == expected(wanted)

    run(test)


def test_stats_follow_the_engine_also_when_idle() -> None:
    async def test(client: EngineClient) -> None:
        await tokens_of(client, request([1], max_tokens=9))
        await eventually(lambda: client.stats.generated_tokens == 9 and client.stats.pages_free == PAGES)

    run(test)


def test_a_reset_reaches_the_engine_before_later_requests() -> None:
    """Also among requests that run: nobody waits in between."""

    async def test(client: EngineClient) -> None:
        async def cached(seed: int) -> int:
            outputs = await collect(client, request(list(range(10, 50)), max_tokens=5, seed=seed))
            return max(output.cached_tokens for output in outputs)

        slow = asyncio.create_task(tokens_of(client, request([SLOW], max_tokens=50)))
        assert [await cached(seed) for seed in (1, 2)] == [0, 32]
        client.reset_prefix_cache()
        assert [await cached(seed) for seed in (3, 4)] == [0, 32]
        assert len(await slow) == 50
        await eventually(lambda: client.stats.prefix_queries == 161 and client.stats.prefix_hits == 64)

    run(test)


def test_an_engine_that_is_gone_resets_nothing() -> None:
    async def test(client: EngineClient) -> None:
        await asyncio.gather(tokens_of(client, request([CRASH])), return_exceptions=True)
        assert "it broke" in await client.wait_dead()
        with pytest.raises(EngineDead, match="it broke"):
            client.reset_prefix_cache()

    run(test)


def test_leaving_early_aborts() -> None:
    async def test(client: EngineClient) -> None:
        async with aclosing(client.generate(request([SLOW], max_tokens=10_000))) as outputs:
            await anext(outputs)
            await eventually(lambda: client.stats.running == 1)
        assert client.live == 0
        await eventually(lambda: client.stats.running == 0)

    run(test)


def test_cancelling_a_waiting_task_aborts() -> None:
    async def test(client: EngineClient) -> None:
        task = asyncio.create_task(tokens_of(client, request([SLOW], max_tokens=10_000)))
        await eventually(lambda: client.stats.running == 1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await eventually(lambda: client.stats.running == 0)

    run(test)


def test_abort_ends_the_generator_with_a_reason() -> None:
    async def test(client: EngineClient) -> None:
        task = asyncio.create_task(collect(client, request([SLOW], max_tokens=10_000)))
        await eventually(lambda: client.stats.running == 1)
        client.abort_all()
        outputs = await task
        assert [output.finish_reason for output in outputs[-2:]] == [None, "abort"]
        await eventually(lambda: client.stats.running == 0)

    run(test)


def test_an_id_cannot_be_live_twice() -> None:
    async def test(client: EngineClient) -> None:
        wanted = request([SLOW], max_tokens=50)
        async with aclosing(client.generate(wanted)) as outputs:
            await anext(outputs)
            with pytest.raises(ValueError, match="live already"):
                await tokens_of(client, wanted)

    run(test)


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        (CRASH, "RuntimeError: it broke"),
        (EXIT, "the engine process ended with status 7"),
        (HANG, "the engine has been at one round for more than 2 s"),
    ],
)
def test_every_waiting_request_hears_of_the_death(prompt: int, reason: str) -> None:
    async def test(client: EngineClient) -> None:
        waiting = [asyncio.create_task(tokens_of(client, request([SLOW], max_tokens=10_000))) for _ in range(3)]
        await eventually(lambda: client.stats.running == 3)
        with pytest.raises(EngineDead, match=reason):
            await tokens_of(client, request([prompt]))
        for result in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(result, EngineDead)
            assert str(result) == reason
        assert client.dead == reason == await client.wait_dead()
        with pytest.raises(EngineDead, match=reason):
            await tokens_of(client, request([1]))

    run(test, timeout_s=2)


def test_killing_the_process_is_noticed() -> None:
    async def test(client: EngineClient) -> None:
        task = asyncio.create_task(tokens_of(client, request([SLOW], max_tokens=10_000)))
        await eventually(lambda: client.stats.running == 1)
        os.kill(client.pid, signal.SIGKILL)
        with pytest.raises(EngineDead, match="status -9"):
            await task

    run(test)


def test_a_stopped_process_counts_as_hung_long_before_a_round_does() -> None:
    async def test(client: EngineClient) -> None:
        os.kill(client.pid, signal.SIGSTOP)
        assert await client.wait_dead() == "the engine process was silent for 3 s"

    run(test, timeout_s=10_000)


def test_a_client_that_stood_still_does_not_blame_the_engine() -> None:
    async def test(client: EngineClient) -> None:
        time.sleep(BEAT_S * (MISSED_BEATS + 1))
        await asyncio.sleep(BEAT_S)
        wanted = request([1], max_tokens=9)
        assert await tokens_of(client, wanted) == expected(wanted)

    run(test, timeout_s=1)


def test_signals_do_not_stop_the_engine() -> None:
    async def test(client: EngineClient) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(client.pid, number)
        wanted = request([1], max_tokens=9)
        assert await tokens_of(client, wanted) == expected(wanted)

    run(test)


@pytest.mark.parametrize(
    ("model", "limit", "reason"),
    [
        ("no-such-model", 30, "there is no such model"),
        ("bug", 30, "RuntimeError: cannot load"),
        ("slow", 0.5, "not ready after 0.5 s"),
    ],
)
def test_an_engine_that_does_not_come_up(own_tmp: Path, model: str, limit: float, reason: str) -> None:
    before = set(psutil.Process().children())

    async def main() -> None:
        with pytest.raises(EngineDead, match=reason):
            async with started(model, start_timeout_s=limit):
                pass

    asyncio.run(main())
    assert set(psutil.Process().children()) <= before
    assert list(own_tmp.iterdir()) == []


def test_compiling_kernels_takes_none_of_the_time_to_start() -> None:
    began = time.monotonic()

    async def test(client: EngineClient) -> None:
        assert client.ready.model == "compiles"

    run(test, model="compiles", start_timeout_s=COMPILE_S - 1)
    assert time.monotonic() - began >= COMPILE_S


def test_a_command_that_ends_at_once() -> None:
    async def main() -> None:
        config = EngineConfig(model="fake")
        command = (sys.executable, "-c", "raise SystemExit(3)")
        with pytest.raises(EngineDead, match="status 3 while starting"):
            await EngineClient.start(config, start_timeout_s=30, timeout_s=30, command=command)

    asyncio.run(main())


def test_a_temporary_directory_with_too_long_a_name(own_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = own_tmp / ("x" * 100)
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))

    async def main() -> None:
        with pytest.raises(EngineDead, match="name is too long"):
            async with started():
                pass

    asyncio.run(main())
    assert list(place.iterdir()) == []


def test_a_parent_that_says_nothing() -> None:
    done = subprocess.run(COMMAND, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_nothing_remains(own_tmp: Path) -> None:
    seen: list[psutil.Process] = []

    async def test(client: EngineClient) -> None:
        (directory,) = own_tmp.iterdir()
        assert directory.stat().st_mode & 0o777 == 0o700
        seen.append(psutil.Process(client.pid))
        await tokens_of(client, request([1]))

    run(test)
    assert not seen[0].is_running()
    assert list(own_tmp.iterdir()) == []


def test_nothing_remains_if_even_the_end_is_cut_short(own_tmp: Path) -> None:
    """Cancelling the start while a failed engine is being closed leaves no process behind."""
    before = set(psutil.Process().children())

    async def main() -> None:
        starting = asyncio.create_task(
            EngineClient.start(EngineConfig(model="slow"), start_timeout_s=0.5, timeout_s=30, command=COMMAND)
        )
        while not any(client.dead == "the engine was stopped" for client in clients):
            await asyncio.sleep(0.02)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        for child in set(psutil.Process().children()) - before:
            child.wait(30)

    clients: list[EngineClient] = []
    with pytest.MonkeyPatch.context() as patch:
        init = EngineClient.__init__

        def known(client: EngineClient, *arguments: Any, **others: Any) -> None:
            init(client, *arguments, **others)
            clients.append(client)

        patch.setattr(EngineClient, "__init__", known)
        asyncio.run(main())
    assert list(own_tmp.iterdir()) == []


def test_closing_ends_waiting_requests() -> None:
    async def main() -> None:
        async with started() as client:
            task = asyncio.create_task(tokens_of(client, request([SLOW], max_tokens=10_000)))
            await eventually(lambda: client.stats.running == 1)
        with pytest.raises(EngineDead, match="stopped"):
            await task

    asyncio.run(main())
