"""The engine process: `python -m engine.processes.engine_server`, started by an API process (client.py).

The parent writes one JSON line to stdin, `EngineLaunch`, and keeps stdin open. When stdin closes, on purpose or because
the parent died, the engine stops. Signals do not stop it: after Ctrl-C in a terminal, or a signal to the whole process
group, the API process must be able to drain running requests first. torchrun.py runs the same `serve` for an engine
that torchrun starts.

A ROUTER socket serves any number of API processes, each a DEALER. A peer's first message introduces it, and the engine
answers with Ready. Between two rounds it acknowledges or refuses new requests, and changes its state or its weights.
Outputs go to the peer that sent the request; about once a second every other peer receives Outputs without content, for
the stats. When a peer cannot be reached any more, its requests are aborted. A second socket carries the heartbeat
(heartbeat.py).
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import msgspec
import zmq

from engine.config.deployment import EngineConfig
from engine.logs import LogFormat, set_up
from engine.messages import (
    FINISH_ABORT,
    RETRY_FULL,
    AbortRequests,
    AddRequest,
    ControlEngine,
    ControlResult,
    Dead,
    EngineStats,
    Outputs,
    Ready,
    RequestOutput,
    ResetPrefixCache,
    ToEngine,
    protocol,
)
from engine.processes.endpoint import HEARTBEAT, SOCKET, remove
from engine.processes.heartbeat import HeartbeatSender
from engine.processes.loading_code import without_collecting
from engine.ranks.resident_weights import WeightsRefused
from engine.scheduler.validation import QueueFull

_STATS_S = 1.0
"""Maximum age of a peer's stats."""
_STDIN = 0
_DEAD_TIMEOUT_MS = 2000
"""Time for a failed engine to send its peers the reason."""
_ORPHAN_GRACE_S = 10.0
"""Time for a stopped engine to finish its round and close, before it is killed."""

Compiling = Callable[[], AbstractContextManager[None]]
"""Context that an engine is in while it compiles kernels."""

logger = logging.getLogger(__name__)


class EngineLaunch(msgspec.Struct):
    """The parent's message to the engine process."""

    config: dict[str, Any]
    """Fields of EngineConfig, in JSON mode."""
    directory: str
    """Directory for the ipc sockets and nothing else; removed with them when the engine ends."""
    log_level: str = "info"
    log_format: LogFormat = "text"


class EngineLike(Protocol):
    """Interface of engine.core.Engine that the loop uses."""

    ready: Ready
    overlaps: bool
    """Whether the host is free while a round runs."""

    def add(self, request: AddRequest) -> None: ...
    def abort(self, ids: Iterable[str]) -> None: ...
    def reset_prefix_cache(self) -> None: ...
    def has_work(self) -> bool: ...
    def pause(self, abort: bool) -> list[RequestOutput]: ...
    def resume(self) -> None: ...
    def update_weights(self, path: str) -> None: ...
    def sleep(self) -> None: ...
    def wake_up(self) -> None: ...
    def step(self, meanwhile: Callable[[], None]) -> list[RequestOutput]: ...
    def check_ranks(self) -> float: ...
    def stats(self) -> EngineStats: ...
    def close(self) -> None: ...


class EngineServer:
    """Loop that runs one engine and exchanges messages with its peers."""

    def __init__(
        self, socket: zmq.Socket[bytes], engine: EngineLike, heartbeat: HeartbeatSender, parent_fd: int
    ) -> None:
        """parent_fd: file descriptor that becomes readable when the parent closes its end; the engine then stops."""
        self._socket = socket
        self._poller = zmq.Poller()
        self._poller.register(socket, zmq.POLLIN)
        self._poller.register(parent_fd, zmq.POLLIN)
        self._engine = engine
        self._heartbeat = heartbeat
        self._parent_fd = parent_fd
        self._decoder, self._protocol = msgspec.msgpack.Decoder(ToEngine), protocol()
        self._last_sent: dict[bytes, float] = {}
        self._peer_by_request: dict[str, bytes] = {}
        self._pending: list[RequestOutput] = []  # outputs of the newest round, not sent yet

    @property
    def peers(self) -> list[bytes]:
        return list(self._last_sent)

    def run(self) -> None:
        """Serve until the parent closes its end. Raises the errors of engine.step and engine.check_ranks.

        A round's outputs are sent at once or, so that the next round does not wait for it, while a device is busy with
        that round.
        """
        try:
            self._serve()
        finally:
            self._flush()  # if a round fails, sends the outputs of the round before it

    def _serve(self) -> None:
        idle_s = _STATS_S
        while self._parent_fd not in dict(
            self._poller.poll(0 if self._engine.has_work() else math.ceil(idle_s * 1000))
        ):
            self._heartbeat.begin_turn()
            self._receive()
            if self._engine.has_work():
                outputs = self._engine.step(self._flush)
                self._pending += outputs
            if not self._engine.overlaps or not self._engine.has_work():
                self._flush()
            if not self._engine.has_work():
                idle_s = min(_STATS_S, self._engine.check_ranks())
            self._refresh_stats()

    def _receive(self) -> None:
        while True:
            try:
                peer, data = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if peer not in self._last_sent:
                self._last_sent[peer] = 0.0
                ready, stats = self._engine.ready, self._engine.stats()
                told = {"heartbeat": self._heartbeat.name, "protocol": self._protocol}
                self._send(peer, msgspec.structs.replace(ready, stats=stats, **told))
            try:
                message: ToEngine = self._decoder.decode(data)
            except msgspec.MsgspecError as error:
                logger.error("cannot read a message: %s", error)
                if (id := _request_id(data)) is not None:
                    self._refuse(peer, id, f"the engine cannot read the request: {error}")
                continue
            if isinstance(message, AbortRequests):
                self._abort(message.ids)
            elif isinstance(message, ResetPrefixCache):
                self._engine.reset_prefix_cache()
                logger.info("the prefix cache was reset")
            elif isinstance(message, ControlEngine):
                self._control(peer, message)
            else:
                self._add(peer, message)

    def _add(self, peer: bytes, request: AddRequest) -> None:
        try:
            self._engine.add(request)
        except ValueError as error:
            self._refuse(peer, request.id, str(error), RETRY_FULL if isinstance(error, QueueFull) else None)
        else:
            self._peer_by_request[request.id] = peer
            self._send(peer, Outputs([RequestOutput(request.id, queued=True)], self._engine.stats()))

    def _control(self, peer: bytes, message: ControlEngine) -> None:
        self._flush()  # what was computed before a change is sent before its answer
        refusal, engine = None, self._engine
        logger.info("%s", f"{message.action} {message.path}".rstrip())
        with self._heartbeat.loading():
            try:
                if message.action == "pause":
                    self._dispatch(engine.pause(message.abort))
                elif message.action == "update_weights":
                    engine.update_weights(message.path)
                else:
                    {"resume": engine.resume, "sleep": engine.sleep, "wake_up": engine.wake_up}[message.action]()
            except WeightsRefused as error:
                refusal = str(error)
        stats = engine.stats()
        logger.info("%s: %s", message.action, f"the engine is {stats.state}" if refusal is None else refusal)
        self._send(peer, ControlResult(message.id, stats, refusal))

    def _refuse(self, peer: bytes, id: str, reason: str, retry: str | None = None) -> None:
        refusal = RequestOutput(id=id, finish_reason=FINISH_ABORT, error=reason, retry=retry)
        self._send(peer, Outputs([refusal], self._engine.stats()))

    def _abort(self, ids: list[str]) -> None:
        self._engine.abort(ids)
        for id in ids:
            self._peer_by_request.pop(id, None)
        # Another request may soon reuse the id.
        self._pending = [output for output in self._pending if output.id not in ids]

    def _flush(self) -> None:
        outputs, self._pending = self._pending, []
        self._dispatch(outputs)

    def _dispatch(self, outputs: list[RequestOutput]) -> None:
        by_peer: dict[bytes, list[RequestOutput]] = defaultdict(list)
        for output in outputs:
            peer = self._peer_by_request.get(output.id)
            if peer is not None:
                by_peer[peer].append(output)
            if output.finish_reason is not None:
                self._peer_by_request.pop(output.id, None)
        if by_peer:
            stats = self._engine.stats()
            for peer, theirs in by_peer.items():
                self._send(peer, Outputs(theirs, stats))

    def _refresh_stats(self) -> None:
        due = time.monotonic() - _STATS_S
        quiet = [peer for peer, sent in self._last_sent.items() if sent < due]
        if quiet:
            stats = self._engine.stats()
            for peer in quiet:
                self._send(peer, Outputs([], stats))

    def _send(self, peer: bytes, message: Ready | Outputs | ControlResult) -> None:
        try:
            self._socket.send_multipart([peer, msgspec.msgpack.encode(message)])
            self._last_sent[peer] = time.monotonic()
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            lost = [id for id, owner in self._peer_by_request.items() if owner == peer]
            logger.warning("an API process is gone; aborting its %d requests", len(lost))
            self._last_sent.pop(peer, None)
            self._abort(lost)


def send_dead(socket: zmq.Socket[bytes], reason: str, peers: Iterable[bytes]) -> None:
    """Send Dead to `peers` and to peers that introduce themselves now; without any, wait a moment for one."""
    known = set(peers)
    while socket.poll(0 if known else _DEAD_TIMEOUT_MS):
        known.add(socket.recv_multipart()[0])
    for peer in known:
        with contextlib.suppress(zmq.ZMQError):
            socket.send_multipart([peer, msgspec.msgpack.encode(Dead(reason))])


def main(load_engine: Callable[[EngineConfig, Compiling], EngineLike]) -> int:
    """Read EngineLaunch from stdin, load the engine, serve until stdin closes. Returns the exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if os.getpgrp() != os.getpid():
        # In a process group of its own: if the parent dies while a signal has stopped this process, the system ends it.
        os.setpgid(0, 0)
    line = sys.stdin.buffer.readline()
    if not line:  # the parent closed stdin without a launch
        return 0
    launch = msgspec.json.decode(line, type=EngineLaunch)
    set_up(launch.log_level, launch.log_format)
    config = launch.config
    return serve(lambda enter: load_engine(EngineConfig.model_validate(config), enter), Path(launch.directory), _STDIN)


def serve(
    load_engine: Callable[[Compiling], EngineLike], directory: Path, parent_fd: int, has_no_parent: bool = False
) -> int:
    """Open the sockets, load the engine, serve until the other end of the file descriptor `parent_fd` is closed.

    load_engine: enters the context that it is passed while it compiles kernels, so that its start may take longer.
    directory: for the sockets; removed with them at the end. has_no_parent: no parent reports why the engine ends, so
    it logs the reason and sends it to its peers. Returns the exit status: 1 if the engine failed.
    """
    stop, closed = threading.Event(), threading.Event()
    threading.Thread(target=_watch, args=(parent_fd, stop, closed, directory), daemon=True).start()

    with contextlib.ExitStack() as cleanup:
        cleanup.callback(closed.set)
        cleanup.callback(remove, directory)
        context = cleanup.enter_context(zmq.Context())
        heartbeat = cleanup.enter_context(HeartbeatSender(context, directory / HEARTBEAT))
        socket = cleanup.enter_context(context.socket(zmq.ROUTER))
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.setsockopt(zmq.LINGER, _DEAD_TIMEOUT_MS)
        socket.bind(f"ipc://{directory / SOCKET}")
        server = None
        try:
            engine = load_engine(heartbeat.compiling)
            cleanup.callback(engine.close)
            server = EngineServer(socket, engine, heartbeat, parent_fd)
            server.run()
            if has_no_parent and server.peers:
                send_dead(socket, _stop_reason(engine), server.peers)
        except Exception as error:
            # While loading, a ValueError concerns the settings or the model; any other error needs a traceback.
            expected = server is None and isinstance(error, ValueError)
            if not expected and not stop.is_set():
                logger.exception("the engine stopped")
            elif has_no_parent:
                logger.error("the engine stopped: %s", error)
            send_dead(socket, _reason(error, expected), server.peers if server else ())
            return 1
    return 0


def _stop_reason(engine: EngineLike) -> str:
    """Return why the engine was stopped, perhaps because a rank is gone."""
    try:
        engine.check_ranks()
    except RuntimeError as error:
        return f"the engine was stopped: {error}"
    return "the engine was stopped"


def _watch(parent_fd: int, stop: threading.Event, closed: threading.Event, directory: Path) -> None:
    while os.read(parent_fd, 4096):  # not sys.stdin: its lock must be free when the interpreter ends
        pass
    stop.set()
    if not closed.wait(_ORPHAN_GRACE_S):
        remove(directory)
        os._exit(1)


def _request_id(data: bytes) -> str | None:
    """Return the id of an otherwise unreadable request, whose sender waits for its end; None if it has none."""
    try:
        return msgspec.msgpack.decode(data, type=_RequestId).id
    except msgspec.MsgspecError:
        return None


class _RequestId(msgspec.Struct):
    id: str


def _reason(error: Exception, expected: bool) -> str:
    text = str(error).strip()
    return text if expected and text else f"{type(error).__name__}: {text}"


def _start() -> int:
    with without_collecting():
        from engine.core import Engine  # loads torch, which other importers of this module do not need

    return main(lambda config, compiling: Engine(config, compiling=compiling, progress=sys.stderr.isatty()))


if __name__ == "__main__":
    sys.exit(_start())
