"""API processes that attach to an engine started elsewhere, and the directory where both find the socket."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import typer
import zmq.asyncio

from engine.messages import AddRequest
from engine.params import SamplingParams
from engine.processes.client import EngineClient, EngineDead
from engine.processes.endpoint import EndpointError, claim, remove
from engine.processes.handshake import wait_for_engine
from server.cli.serve import serve
from tests.support.fake_engine import SLOW, expected
from tests.support.paths import ROOT

CODE = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from engine.config.deployment import EngineConfig
from engine.processes.endpoint import claim
from engine.processes.engine_server import serve
from tests.support.fake_engine import FakeEngine
parent_fd, held = os.pipe()
signal.signal(signal.SIGTERM, lambda *_: os.close(held))
claim(Path(sys.argv[1]))
load = lambda compiling: FakeEngine(EngineConfig(model=sys.argv[2]), compiling)
sys.exit(serve(load, Path(sys.argv[1]), parent_fd, has_no_parent=True))
"""


@pytest.fixture
def engines(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Return a function that starts engine processes in the same directory, one after another."""
    running: list[subprocess.Popen[bytes]] = []

    def start(model: str = "fake") -> subprocess.Popen[bytes]:
        running.append(subprocess.Popen([sys.executable, "-c", CODE, str(tmp_path / "e"), model]))
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.wait()


@asynccontextmanager
async def attached(tmp_path: Path, timeout_s: float = 60, model: str = "fake") -> AsyncIterator[EngineClient]:
    client = await EngineClient.attach(tmp_path / "e", model=model, start_timeout_s=timeout_s, timeout_s=30)
    try:
        yield client
    finally:
        await client.close()


def request(id: str, first: int = 1, max_tokens: int = 9) -> AddRequest:
    return AddRequest(id, [first], SamplingParams(max_tokens=max_tokens, ignore_eos=True))


async def answered(client: EngineClient, id: str) -> None:
    wanted = request(id)
    assert [token async for output in client.generate(wanted) for token in output.tokens] == expected(wanted)


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(120):
            await test()

    asyncio.run(main())


async def waiting(client: EngineClient) -> asyncio.Task[None]:
    """Start a request that does not end."""

    async def consume() -> None:
        async for _ in client.generate(request("long", SLOW, 100_000)):
            pass

    task = asyncio.create_task(consume())
    while client.stats.running == 0:
        await asyncio.sleep(0.02)
    return task


def test_several_clients_come_and_go(tmp_path: Path, engines: Callable[..., subprocess.Popen[bytes]]) -> None:
    async def test() -> None:
        first = asyncio.create_task(EngineClient.attach(tmp_path / "e", model="fake", start_timeout_s=60, timeout_s=30))
        await asyncio.sleep(0.2)  # no engine is running yet
        process = engines()
        async with attached(tmp_path) as second:
            await asyncio.gather(answered(await first, "a"), answered(second, "b"))
            await (await first).close()
            await answered(second, "c")
        assert process.poll() is None

    run(test)


def test_stopping_it_says_so_and_another_takes_its_place(
    tmp_path: Path, engines: Callable[..., subprocess.Popen[bytes]]
) -> None:
    async def test() -> None:
        process = engines()
        async with attached(tmp_path) as client:
            assert (tmp_path / "e").stat().st_mode & 0o777 == 0o700
            task = await waiting(client)
            process.send_signal(signal.SIGTERM)
            with pytest.raises(EngineDead, match=r"^the engine was stopped$"):
                await task
            assert await asyncio.to_thread(process.wait) == 0
            assert not (tmp_path / "e").exists()
            engines()
            async with attached(tmp_path) as again:
                await answered(again, "a")

    run(test)


def test_one_that_is_killed_and_started_again(tmp_path: Path, engines: Callable[..., subprocess.Popen[bytes]]) -> None:
    """The second engine tolerates the files that the first one left, and the client does not mistake it for the
    first."""

    async def test() -> None:
        process = engines()
        async with attached(tmp_path) as client:
            task = await waiting(client)
            process.kill()
            process.wait()
            engines()
            with pytest.raises(EngineDead, match=r"started again|was silent"):
                await task
            async with attached(tmp_path) as again:
                await answered(again, "a")

    run(test)


def test_an_engine_that_fails_to_load_may_be_followed_by_one_that_does_not(
    tmp_path: Path, engines: Callable[..., subprocess.Popen[bytes]]
) -> None:
    async def test() -> None:
        failing = engines("no-such-model")
        coming = asyncio.create_task(answered_by(tmp_path))
        assert await asyncio.to_thread(failing.wait) == 1
        engines()
        await coming

    async def answered_by(tmp_path: Path) -> None:
        async with attached(tmp_path) as client:
            await answered(client, "a")

    run(test)


def test_no_engine_and_the_wrong_engine(tmp_path: Path, engines: Callable[..., subprocess.Popen[bytes]]) -> None:
    async def test() -> None:
        with pytest.raises(EngineDead, match=r"no engine was ready in .*/e within 0\.1 s$"):
            async with attached(tmp_path, 0.1):
                pass
        engines()
        with pytest.raises(EngineDead, match="serves fake, not other"):
            async with attached(tmp_path, model="other"):
                pass

    run(test)


def test_an_engine_of_another_version(
    tmp_path: Path, engines: Callable[..., subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        engines()
        monkeypatch.setattr("engine.processes.client.protocol", lambda: "of another version")
        with pytest.raises(EngineDead, match="is of another version than this process"):
            async with attached(tmp_path):
                pass

    run(test)


def test_an_engine_that_cannot_be_read(tmp_path: Path) -> None:
    async def test() -> None:
        context = zmq.asyncio.Context()
        engine, socket, heartbeat = (context.socket(kind) for kind in (zmq.ROUTER, zmq.DEALER, zmq.SUB))
        engine.bind("inproc://engine")
        socket.connect("inproc://engine")
        waiting = asyncio.create_task(wait_for_engine(socket, heartbeat, tmp_path, 30))
        peer, _ = await engine.recv_multipart()
        await engine.send_multipart([peer, msgspec.msgpack.encode({"type": "ready", "model": 7})])
        with pytest.raises(EngineDead, match="another version than this process: Expected `str`, got `int`"):
            await waiting
        context.destroy(linger=0)

    run(test)


def test_two_engines_in_one_directory(tmp_path: Path, engines: Callable[..., subprocess.Popen[bytes]]) -> None:
    async def test() -> None:
        engines()
        async with attached(tmp_path) as client:
            with pytest.raises(EndpointError, match="another engine runs in it"):
                claim(tmp_path / "e")
            await answered(client, "a")

    run(test)


def test_an_engine_that_another_user_may_have_put_there(
    tmp_path: Path, engines: Callable[..., subprocess.Popen[bytes]]
) -> None:
    async def test() -> None:
        engines()
        async with attached(tmp_path):
            os.chmod(tmp_path / "e", 0o755)
            with pytest.raises(EngineDead, match="only this user's"):
                async with attached(tmp_path):
                    pass

    run(test)


def test_directories_that_cannot_be(tmp_path: Path) -> None:
    for name, mode in (("open", 0o755), ("mine", 0o700)):
        (tmp_path / name).mkdir()
        os.chmod(tmp_path / name, mode)
    with pytest.raises(EndpointError, match="only this user's"):
        claim(tmp_path / "open")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    with pytest.raises(EndpointError, match="link: no sockets there"):
        claim(tmp_path / "link")
    with pytest.raises(EndpointError, match="no sockets there: No such file"):
        claim(tmp_path / "absent" / "e")
    with pytest.raises(EndpointError, match="its name is too long for sockets in it, by"):
        claim(tmp_path / ("x" * 200))
    claim(tmp_path / "mine")
    remove(tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


def test_flags_of_an_engine_that_is_there_already(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="settings already") as caught:
        serve(engine=tmp_path, tensor_parallel_size=4, speculation="off")
    assert caught.value.param_hint == ["--tensor-parallel-size", "--speculation"]
