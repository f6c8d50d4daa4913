"""Heartbeat of an engine process, both ends: each beat carries the seconds that the loop's current turn has taken.
Free of torch.

Beats have a thread and a socket of their own, so they continue while a round computes. Missing beats mean that the
process hangs or is stopped, which is detected within seconds; a single round may take longer. A beat also carries the
process's name, since another process can take over the same path. While the engine starts, beats say whether it
compiles kernels, which takes minutes and does not count into the time that a start may take; later they say whether it
loads weights, which may take as long as a start.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec
import zmq
import zmq.asyncio

BEAT_S = 0.5
"""Time between two beats."""
MISSED_BEATS = 6
"""Number of missing beats in a row after which the process counts as hung."""


class _Beat(msgspec.Struct, array_like=True):
    name: bytes
    busy: float
    """Seconds since the loop's current turn began, or since it began to load weights."""
    compiling: bool = False
    loading: bool = False


class HeartbeatSender:
    """Sender of beats on `path`, an ipc socket; a context manager, which sends from enter to exit."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], path: Path) -> None:
        self._socket = context.socket(zmq.PUB)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(f"ipc://{path}")
        self.name = os.urandom(8)
        self._turn_began: float | None = None  # loading: no turn yet
        self._compiling = self._loading = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)  # owns the socket from now on

    def begin_turn(self) -> None:
        """Record that the engine's loop begins a turn."""
        self._turn_began = time.monotonic()

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """Let beats say that the engine loads weights; another turn begins before and after it."""
        self.begin_turn()
        self._loading = True
        try:
            yield
        finally:
            self.begin_turn()
            self._loading = False

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Let beats say that the engine compiles kernels."""
        self._compiling = True
        try:
            yield
        finally:
            self._compiling = False

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _beat(self) -> None:
        with self._socket:
            while not self._ended.wait(BEAT_S):
                busy = 0.0 if self._turn_began is None else time.monotonic() - self._turn_began
                self._socket.send(msgspec.msgpack.encode(_Beat(self.name, busy, self._compiling, self._loading)))


@contextlib.asynccontextmanager
async def start_timeout(socket: zmq.asyncio.Socket, timeout_s: float) -> AsyncIterator[None]:
    """Raise TimeoutError in what runs within this context once an engine has been starting for `timeout_s`, counted
    anew after each time that it compiles. socket: SUB, connected to its heartbeat."""
    async with asyncio.timeout(timeout_s) as limit:

        async def extend() -> None:
            while True:
                if msgspec.msgpack.decode(await socket.recv(), type=_Beat).compiling:
                    limit.reschedule(asyncio.get_running_loop().time() + timeout_s)

        extending = asyncio.create_task(extend())
        try:
            yield
        finally:
            extending.cancel()


async def wait_hung(socket: zmq.asyncio.Socket, name: bytes, turn_s: float, load_s: float) -> str:
    """Wait until the engine process counts as hung, and return the reason.

    socket: SUB, connected to its heartbeat. name: name of the process (Ready.heartbeat). turn_s: time that one turn of
    its loop may take. load_s: time that it may take to load weights. Silence is counted in waits, not in clock time: if
    this process itself is stopped, that counts as one wait, and the beats that arrived meanwhile are read after it.
    """
    missed = 0
    while missed < MISSED_BEATS:
        if not await socket.poll(int(BEAT_S * 1000)):
            missed += 1
            continue
        missed = 0
        beat = msgspec.msgpack.decode(await socket.recv(), type=_Beat)
        if beat.name != name:
            return "the engine has been started again"
        if beat.loading and beat.busy > load_s:
            return f"the engine has been loading weights for more than {load_s:g} s"
        if not beat.loading and beat.busy > turn_s:
            return f"the engine has been at one round for more than {turn_s:g} s"
    return f"the engine process was silent for {BEAT_S * MISSED_BEATS:g} s"
