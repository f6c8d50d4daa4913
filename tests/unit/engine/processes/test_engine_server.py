"""The engine process and its loop, around a FakeEngine, over its sockets."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import Mock

import msgspec
import pytest
import zmq

from engine.config.deployment import EngineConfig
from engine.messages import (
    AbortRequests,
    AddRequest,
    FromEngine,
    Outputs,
    Ready,
    RequestOutput,
    ResetPrefixCache,
    ToEngine,
)
from engine.params import SamplingParams
from engine.processes.endpoint import SOCKET
from engine.processes.engine_server import EngineServer
from tests.support.fake_engine import COMMAND, HANG, SLOW, FakeEngine, expected

pytestmark = pytest.mark.usefixtures("own_tmp")


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


def send(socket: zmq.Socket[bytes], message: ToEngine) -> None:
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


def test_any_peer_may_reset_the_prefix_cache(own_tmp: Path) -> None:
    """Also one that has sent nothing before. The cache is every peer's."""

    def cached(peer: zmq.Socket[bytes]) -> int:
        send(peer, AddRequest("r", list(range(10, 50)), SamplingParams(max_tokens=2)))
        while True:
            message = receive(peer)
            for output in message.outputs if isinstance(message, Outputs) else ():
                if output.finish_reason is not None:
                    return output.cached_tokens

    with process(own_tmp / "p") as (_, connect):
        first, second = connect(), connect()
        assert [cached(first), cached(first)] == [0, 32]
        send(second, ResetPrefixCache())
        assert isinstance(receive(second), Ready)  # sent before the reset is handled; nothing answers that
        assert cached(second) == 0
        assert cached(first) == 32


def test_a_request_is_acknowledged_before_its_first_round(own_tmp: Path) -> None:
    """A round that hangs cannot delay the acknowledgement."""
    with process(own_tmp / "p") as (_, connect):
        peer = connect()
        send(peer, AddRequest("r", [HANG], SamplingParams(max_tokens=8)))
        assert isinstance(receive(peer), Ready)
        message = receive(peer)
        assert isinstance(message, Outputs)
        assert message.outputs == [RequestOutput("r", queued=True)]


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
        server._peer_by_request = {"a": b"peer", "b": b"peer"}
        server._pending = [RequestOutput("a", [1]), RequestOutput("b", [2])]
        server._send = lambda peer, message: told.extend(message.outputs)  # type: ignore[method-assign, union-attr]
        server._abort(["a"])
        server._peer_by_request["a"] = b"peer"
        server._flush()
        server._flush()
    os.close(parent_fd)
    os.close(end)
    assert [output.id for output in told] == ["b"]
