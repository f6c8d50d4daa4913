"""EngineClient and the engine process, over a FakeEngine."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import msgspec
import psutil
import pytest
import zmq

from engine.config.deployment import EngineConfig
from engine.messages import AbortRequests, AddRequest, FromEngine, Outputs, Ready, RequestOutput
from engine.params import SamplingParams
from engine.processes.client import EngineClient, EngineDead
from engine.processes.endpoint import SOCKET
from engine.processes.engine_server import EngineServer
from engine.processes.heartbeat import BEAT_S, MISSED_BEATS
from tests.support import fake_engine
from tests.support.fake_engine import COMMAND, CRASH, EXIT, FULL, HANG, PAGES, REFUSE, SLOW, FakeEngine, expected

Test = Callable[[EngineClient], Coroutine[Any, Any, None]]


@pytest.fixture(autouse=True)
def own_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sockets go to a directory where the test can check for leftovers."""
    place = tmp_path / "t"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    return place


def request(prompt: list[int], **params: Any) -> AddRequest:
    return AddRequest(uuid.uuid4().hex, prompt, SamplingParams(**params))


@asynccontextmanager
async def started(
    model: str = "fake", timeout_s: float = 30, start_timeout_s: float = 30
) -> AsyncIterator[EngineClient]:
    client = await EngineClient.start(
        EngineConfig(model=model), start_timeout_s=start_timeout_s, timeout_s=timeout_s, command=COMMAND
    )
    try:
        yield client
    finally:
        await client.close()


def run(test: Test, **settings: Any) -> None:
    async def main() -> None:
        async with asyncio.timeout(60), started(**settings) as client:
            await test(client)

    asyncio.run(main())


async def tokens_of(client: EngineClient, wanted: AddRequest) -> list[int]:
    return [token async for output in client.generate(wanted) for token in output.tokens]


async def eventually(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.02)


def test_requests_get_their_own_tokens() -> None:
    async def test(client: EngineClient) -> None:
        assert client.ready.vocab_size == fake_engine.VOCAB
        requests = [request([number], max_tokens=number, seed=number) for number in range(1, 40)]
        got = await asyncio.gather(*(tokens_of(client, wanted) for wanted in requests))
        assert got == [expected(wanted) for wanted in requests]
        assert client.live == 0

    run(test)


def test_the_last_output_says_why_it_ended() -> None:
    async def test(client: EngineClient) -> None:
        outputs = [output async for output in client.generate(request([5], max_tokens=7))]
        assert [output.finish_reason for output in outputs] == [None, None, "length"]

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


async def collect(client: EngineClient, wanted: AddRequest) -> list[RequestOutput]:
    return [output async for output in client.generate(wanted)]


def test_stats_follow_the_engine_also_when_idle() -> None:
    async def test(client: EngineClient) -> None:
        await tokens_of(client, request([1], max_tokens=9))
        await eventually(lambda: client.stats.generated_tokens == 9 and client.stats.pages_free == PAGES)

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
        with pytest.raises(EngineDead, match="too long a name"):
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


# The engine process itself, over a bare socket.


@contextmanager
def process(directory: Path) -> Iterator[tuple[subprocess.Popen[bytes], Callable[[], zmq.Socket[bytes]]]]:
    directory.mkdir()
    child = subprocess.Popen(COMMAND, stdin=subprocess.PIPE)
    assert child.stdin is not None
    launch = {"config": {"model": "fake"}, "directory": str(directory)}
    child.stdin.write(json.dumps(launch).encode() + b"\n")
    child.stdin.flush()
    with zmq.Context() as context:
        context.linger = 0

        def connect() -> zmq.Socket[bytes]:
            socket = context.socket(zmq.DEALER)
            socket.rcvtimeo = 20_000
            socket.connect(f"ipc://{directory / SOCKET}")
            return socket

        try:
            yield child, connect
        finally:
            child.kill()
            child.stdin.close()
            child.wait()
            context.destroy(linger=0)


def send(socket: zmq.Socket[bytes], message: AddRequest | AbortRequests) -> None:
    socket.send(msgspec.msgpack.encode(message))


def receive(socket: zmq.Socket[bytes]) -> Ready | Outputs:
    message = msgspec.msgpack.decode(socket.recv(), type=FromEngine)
    assert isinstance(message, Ready | Outputs)
    return message


def finish(socket: zmq.Socket[bytes]) -> list[int]:
    """Receive until the one request of this peer ends. Returns its tokens."""
    tokens: list[int] = []
    while True:
        message = receive(socket)
        if isinstance(message, Outputs):
            for output in message.outputs:
                tokens += output.tokens
                if output.finish_reason is not None:
                    return tokens


def test_several_peers_with_the_same_socket(own_tmp: Path) -> None:
    with process(own_tmp / "p") as (_, connect):
        first, second = connect(), connect()
        for number, peer in enumerate((first, second)):
            send(peer, AddRequest(f"r{number}", [number], SamplingParams(max_tokens=8)))
        for number, peer in enumerate((first, second)):
            assert isinstance(receive(peer), Ready)
            assert finish(peer) == expected(AddRequest("", [number], SamplingParams(max_tokens=8)))


def test_garbage_does_not_stop_it(own_tmp: Path) -> None:
    with process(own_tmp / "p") as (_, connect):
        peer = connect()
        peer.send(b"garbage")
        peer.send(msgspec.msgpack.encode({"type": "add", "id": 1}))
        peer.send(msgspec.msgpack.encode({"type": "add", "id": "r", "prompt": "text", "params": {}}))
        assert isinstance(receive(peer), Ready)
        message = receive(peer)
        assert isinstance(message, Outputs)
        (refusal,) = message.outputs
        assert (refusal.id, refusal.finish_reason) == ("r", "abort")
        assert "cannot read" in (refusal.error or "")
        send(peer, AddRequest("r", [1], SamplingParams(max_tokens=8)))
        assert len(finish(peer)) == 8


def test_requests_of_a_peer_that_left_are_aborted(own_tmp: Path) -> None:
    with process(own_tmp / "p") as (_, connect):
        leaving, staying = connect(), connect()
        send(leaving, AddRequest("r", [SLOW], SamplingParams(max_tokens=100_000)))
        assert isinstance(receive(leaving), Ready)
        send(staying, AbortRequests([]))
        receive(staying)
        leaving.close()
        while True:
            message = receive(staying)
            if message.stats.running == 0:
                break


def test_it_ends_when_its_parent_does(own_tmp: Path) -> None:
    """Closing the child's stdin simulates the death of its parent."""

    with process(own_tmp / "p") as (child, connect):
        peer = connect()
        send(peer, AddRequest("r", [SLOW], SamplingParams(max_tokens=100_000)))
        receive(peer)
        assert child.stdin is not None
        child.stdin.close()
        assert child.wait(20) == 0
        assert not (own_tmp / "p").exists()


def test_what_is_not_told_yet_of_a_request_goes_with_it() -> None:
    """Pending outputs of an aborted request are dropped: another peer may reuse its id before they are sent."""
    told: list[RequestOutput] = []
    parent_fd, end = os.pipe()
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        server = EngineServer(socket, FakeEngine(EngineConfig()), Mock(), parent_fd)
        server._owner = {"a": b"peer", "b": b"peer"}
        server._pending = [RequestOutput("a", [1]), RequestOutput("b", [2])]
        server._send = lambda peer, message: told.extend(message.outputs)  # type: ignore[method-assign, union-attr]
        server._abort(["a"])
        server._owner["a"] = b"peer"
        server._flush()
        server._flush()
    os.close(parent_fd)
    os.close(end)
    assert [output.id for output in told] == ["b"]
