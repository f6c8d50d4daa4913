"""Client of the engine, for API processes: starts the engine process, or attaches to one. Free of torch."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import sys
import uuid
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncGenerator, Coroutine, Iterable, Iterator, Sequence
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from engine.config.deployment import EngineConfig
from engine.logs import LogFormat
from engine.messages import (
    FINISH_ABORT,
    AbortRequests,
    AddRequest,
    ControlAction,
    ControlEngine,
    ControlResult,
    Dead,
    EngineStats,
    FromEngine,
    Outputs,
    Ready,
    RequestOutput,
    ResetPrefixCache,
    ToEngine,
    protocol,
)
from engine.processes.endpoint import HEARTBEAT, SOCKET, EndpointError, check_private, new_directory
from engine.processes.engine_server import EngineLaunch
from engine.processes.handshake import REASON_TIMEOUT_S, wait_for_engine, wait_ready
from engine.processes.handshake import EngineDead as EngineDead
from engine.processes.heartbeat import wait_hung

ENGINE_COMMAND = (sys.executable, "-m", "engine.processes.engine_server")
_STDERR = 2
_STOP_S = 15.0
"""Time that a stopped engine process may take to end before it is killed; shorter while it is loading."""
_STOP_LOADING_S = 2.0

logger = logging.getLogger(__name__)


class ControlRefused(RuntimeError):
    """The engine did not do what a ControlEngine says; the message gives the reason."""


class EngineClient:
    """Client of one engine process, and owner of the requests sent through it. Use from one event loop.

    ready: the engine's first message. stats: the newest gauges and totals, at most about a second old. dead: reason why
    the engine is gone; None while it is alive.
    """

    def __init__(self, directory: Path, round_s: float, load_s: float, *, owns_directory: bool = False) -> None:
        """Use `start` or `attach`, which wait until the engine is ready."""
        self._process: Process | None = None
        self._directory = directory
        self._owns_directory = owns_directory
        self._round_s, self._load_s = round_s, load_s
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.connect(f"ipc://{directory / SOCKET}")
        self._live: dict[str, asyncio.Queue[RequestOutput | None]] = {}
        self._controls: dict[str, asyncio.Future[ControlResult]] = {}
        self._death = asyncio.Event()
        self.dead: str | None = None
        self.stats = EngineStats()
        self.ready: Ready
        self._stop_s = _STOP_LOADING_S
        self._tasks: list[asyncio.Task[None]] = []

    @classmethod
    async def start(
        cls,
        config: EngineConfig,
        *,
        start_timeout_s: float,
        timeout_s: float,
        log_level: str = "info",
        log_format: LogFormat = "text",
        command: Sequence[str] = ENGINE_COMMAND,
    ) -> EngineClient:
        """Start an engine process and wait until it is ready.

        start_timeout_s: time for it to load, also other weights later, without the time in which it compiles kernels.
        timeout_s: time for one round, after which the engine counts as hung; a process without any heartbeat counts as
        hung much sooner.
        Raises EngineDead if it does not start. Nothing of it remains then, or if this call is cancelled.
        """
        try:
            client = cls(new_directory(), timeout_s, start_timeout_s, owns_directory=True)
        except EndpointError as error:
            raise EngineDead(str(error)) from None
        try:
            # The engine's stdout joins its stderr: a server's stdout is for its user.
            client._process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=_STDERR)
            launch = EngineLaunch(config.model_dump(mode="json"), str(client._directory), log_level, log_format)
            assert client._process.stdin is not None
            with contextlib.suppress(ConnectionError):  # the process has ended already: wait_ready reports it
                client._process.stdin.write(msgspec.json.encode(launch) + b"\n")
                await client._process.stdin.drain()
            with client._subscribe() as heartbeat:
                client.ready = await wait_ready(client._socket, heartbeat, client._process, start_timeout_s)
        except BaseException:
            await client.close()
            raise
        client._stop_s = _STOP_S
        client._start_tasks(client._watch_process(client._process))
        return client

    @classmethod
    async def attach(cls, directory: Path, *, model: str, start_timeout_s: float, timeout_s: float) -> EngineClient:
        """Wait for an engine that another process starts, with its sockets in `directory`. `close` leaves it running.

        model: name of the model that it must serve. start_timeout_s: time to wait; an engine that fails to start
        meanwhile may be followed by another. timeout_s: see `start`.
        Raises EngineDead if there is none, or if another user may have created the directory.
        """
        client = cls(directory, timeout_s, start_timeout_s)
        try:
            with client._subscribe() as heartbeat:
                client.ready = await wait_for_engine(client._socket, heartbeat, directory, start_timeout_s)
            check_private(directory)  # before, the directory may not exist
            if client.ready.protocol != protocol():
                raise EngineDead(f"the engine in {directory} is of another version than this process")
            if client.ready.model != model:
                raise EngineDead(f"the engine in {directory} serves {client.ready.model}, not {model}")
        except EndpointError as error:
            await client.close()
            raise EngineDead(str(error)) from None
        except BaseException:
            await client.close()
            raise
        client._start_tasks()
        return client

    def _start_tasks(self, *watches: Coroutine[None, None, None]) -> None:
        """Start to receive messages from the engine, which is ready."""
        self.stats = self.ready.stats
        self._tasks = [asyncio.create_task(task) for task in (self._receive(), self._watch_heartbeat(), *watches)]

    @property
    def live(self) -> int:
        """Number of requests sent to the engine that have not ended."""
        return len(self._live)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def generate(self, request: AddRequest) -> AsyncGenerator[RequestOutput, None]:
        """Yield the outputs of one request: one with `queued` once the engine has accepted it, then round by round; the
        last one carries a finish_reason.

        Closing the generator before that (aclose, cancellation) aborts the request. Raises EngineDead.
        """
        if self.dead is not None:
            raise EngineDead(self.dead)
        if request.id in self._live:
            raise ValueError(f"request {request.id} is live already")
        queue = self._live[request.id] = asyncio.Queue()
        finished = False
        try:
            self._post(request)
            while not finished:
                output = await queue.get()
                if output is None:
                    raise EngineDead(self.dead)
                finished = output.finish_reason is not None
                yield output
        finally:
            # `abort` removes a request from `_live` and notifies the engine itself.
            if self._live.pop(request.id, None) is not None and not finished and self.dead is None:
                self._post(AbortRequests([request.id]))

    def abort(self, ids: Iterable[str]) -> None:
        """End these requests at once: their generators yield a last output with finish_reason "abort"."""
        mine = [id for id in ids if id in self._live]
        for id in mine:
            self._live.pop(id).put_nowait(RequestOutput(id=id, finish_reason=FINISH_ABORT))
        if mine and self.dead is None:
            self._post(AbortRequests(mine))

    def abort_all(self) -> None:
        self.abort(list(self._live))

    def reset_prefix_cache(self) -> None:
        """Empty the engine's prefix cache. Messages arrive in order: requests sent from now on find nothing of it that
        was there before. Raises EngineDead."""
        if self.dead is not None:
            raise EngineDead(self.dead)
        self._post(ResetPrefixCache())

    async def control(self, action: ControlAction, *, abort: bool = False, path: str = "") -> None:
        """Let the engine do what ControlEngine describes, and wait until it has; `stats` shows its state then. Raises
        ControlRefused, EngineDead."""
        if self.dead is not None:
            raise EngineDead(self.dead)
        id = uuid.uuid4().hex
        future = self._controls[id] = asyncio.get_running_loop().create_future()
        try:
            self._post(ControlEngine(id, action, abort, path))
            result = await future
        finally:
            self._controls.pop(id, None)
        if result.refusal is not None:
            raise ControlRefused(result.refusal)

    async def wait_dead(self) -> str:
        """Return the reason once the engine is gone."""
        await self._death.wait()
        assert self.dead is not None
        return self.dead

    async def close(self) -> None:
        """End the engine process if this client started it; no process, socket or file of it remains. Live requests
        raise EngineDead."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._mark_dead("the engine was stopped")
        try:
            if self._process is not None:
                await self._end(self._process)
        finally:  # also on cancellation, in which case the process has been killed
            self._context.destroy(linger=0)
            if self._owns_directory:
                shutil.rmtree(self._directory, ignore_errors=True)

    def kill(self) -> None:
        """Kill the engine process if this client started it."""
        with contextlib.suppress(ProcessLookupError):
            if self._process is not None:
                self._process.kill()

    async def _end(self, process: Process) -> None:
        assert process.stdin is not None
        process.stdin.close()
        try:
            async with asyncio.timeout(self._stop_s):
                await process.wait()
        except TimeoutError:
            logger.warning("the engine process does not stop; killing it")
        finally:
            self.kill()
        await process.wait()

    async def _receive(self) -> None:
        decoder = msgspec.msgpack.Decoder(FromEngine)
        while self.dead is None:
            try:
                message: FromEngine = decoder.decode(await self._socket.recv())
            except (zmq.ZMQError, msgspec.MsgspecError) as error:
                self._mark_dead(f"cannot receive from the engine: {error}")
                self.kill()
                return
            if isinstance(message, Outputs):
                self.stats = message.stats
                for output in message.outputs:
                    self._deliver(output)
            elif isinstance(message, ControlResult):
                self.stats = message.stats
                waiting = self._controls.get(message.id)
                if waiting is not None and not waiting.done():
                    waiting.set_result(message)
            elif isinstance(message, Dead):
                self._mark_dead(message.reason)
            else:
                self._mark_dead("the engine has been started again")

    def _deliver(self, output: RequestOutput) -> None:
        queue = self._live.get(output.id)
        if queue is None:  # aborted meanwhile
            return
        if output.finish_reason is not None:
            del self._live[output.id]
        queue.put_nowait(output)

    @contextlib.contextmanager
    def _subscribe(self) -> Iterator[zmq.asyncio.Socket]:
        """Subscribe to the engine's heartbeat, whether or not the engine is there yet."""
        with self._context.socket(zmq.SUB) as heartbeat:
            heartbeat.subscribe(b"")
            heartbeat.connect(f"ipc://{self._directory / HEARTBEAT}")
            yield heartbeat

    async def _watch_heartbeat(self) -> None:
        with self._subscribe() as heartbeat:
            self._mark_dead(await wait_hung(heartbeat, self.ready.heartbeat, self._round_s, self._load_s))
        self.kill()

    async def _watch_process(self, process: Process) -> None:
        status = await process.wait()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(REASON_TIMEOUT_S):
                await self._death.wait()
        self._mark_dead(f"the engine process ended with status {status}")

    def _mark_dead(self, reason: str) -> None:
        if self.dead is not None:
            return
        self.dead = reason
        self._death.set()
        for queue in self._live.values():
            queue.put_nowait(None)
        self._live.clear()
        for waiting in self._controls.values():
            if not waiting.done():
                waiting.set_exception(EngineDead(reason))

    def _post(self, message: ToEngine) -> None:
        # The queue to the engine has no limit, so this never waits.
        future = asyncio.ensure_future(self._socket.send(msgspec.msgpack.encode(message)))
        future.add_done_callback(lambda done: done.cancelled() or done.exception())
