"""Lifecycle of a server process: engine and HTTP server start, serve, drain and stop together."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import uvicorn

from engine.config.deployment import Config
from engine.processes.client import ENGINE_COMMAND, EngineClient, EngineDead
from engine.processes.supervisor import Supervisor
from models.tokenizer import Tokenizer
from server.app import create_app
from server.http_protocol import protocol
from server.service import Service

_DEAD_LINGER_S = 2.0
"""Seconds for which health checks can read the reason after the engine has died."""
_CLOSE_S = 5
"""Seconds that connections may take to close at the end."""

logger = logging.getLogger(__name__)


class _HttpServer(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # Lifecycle handles signals: draining must not close the listening socket


class Lifecycle:
    """One running deployment. The first SIGTERM or SIGINT drains, the second ends at once."""

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer,
        listener: socket.socket,
        on_ready: Callable[[Service], None],
        keys: frozenset[str] = frozenset(),
        engine_command: Sequence[str] = ENGINE_COMMAND,
        engine_directory: Path | None = None,
    ) -> None:
        """listener: a bound socket, closed at the end. on_ready: called once the server takes requests.

        keys: API keys; empty: no key is needed. engine_directory: socket directory of an engine to attach to, instead
        of starting one with engine_command.
        """
        self._config = config
        self._tokenizer = tokenizer
        self._listener = listener
        self._on_ready = on_ready
        self._keys = keys
        self._engine_command = engine_command
        self._engine_directory = engine_directory
        self._stop = asyncio.Event()
        self._force = asyncio.Event()

    async def run(self) -> int:
        """Run until the end. Returns the exit status: 0 after a drain, 1 if the engine failed or the end was forced."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._handle_signal)
        service = Service(self._config, self._tokenizer)
        settings = self._config.server
        debug = settings.log_level == "debug"
        http = _HttpServer(
            uvicorn.Config(
                create_app(service, self._keys),
                http=protocol(settings.head_timeout_s),  # type: ignore[arg-type]
                ws="none",
                timeout_keep_alive=settings.keep_alive_s,  # type: ignore[arg-type]
                ssl_certfile=settings.tls_cert,
                ssl_keyfile=settings.tls_key,
                lifespan="off",
                log_config=None,
                log_level="info" if debug else "warning",
                access_log=False,
                # Explicit, so that environment variables do not set them.
                workers=1,
                proxy_headers=False,
                forwarded_allow_ips="",
                server_header=False,
                timeout_graceful_shutdown=_CLOSE_S,
            )
        )
        serving = asyncio.create_task(http.serve(sockets=[self._listener]))
        forcing = asyncio.create_task(self._force_exit(http, serving, service))
        try:
            status = await self._serve(service, serving)
        finally:
            http.should_exit = True
            await asyncio.gather(serving, return_exceptions=True)
            if service.client is not None:
                await service.client.close()
            if service.tracing is not None:
                await asyncio.to_thread(service.tracing.close)
            forcing.cancel()
        return 1 if self._force.is_set() else status

    async def _force_exit(self, http: _HttpServer, serving: asyncio.Task[None], service: Service) -> None:
        """On a forced end, stop waiting for connections and kill the engine, also if both are already ending."""
        await self._force.wait()
        http.force_exit = True
        await asyncio.wait({serving})
        if service.client is not None:
            service.client.kill()

    def _handle_signal(self) -> None:
        if self._stop.is_set():
            self._force.set()
        self._stop.set()

    async def _start_engine(self) -> EngineClient:
        settings = self._config.server
        if self._engine_directory is not None:
            return await EngineClient.attach(
                self._engine_directory,
                model=Path(self._config.engine.model).name,
                start_timeout_s=settings.start_timeout_s,
                timeout_s=settings.engine_timeout_s,
            )
        return await EngineClient.start(
            self._config.engine,
            start_timeout_s=settings.start_timeout_s,
            timeout_s=settings.engine_timeout_s,
            log_level=settings.log_level,
            log_format=settings.log_format,
            command=self._engine_command,
        )

    async def _serve(self, service: Service, serving: asyncio.Task[None]) -> int:
        settings = self._config.server
        starting = asyncio.create_task(
            Supervisor.start(self._start_engine, restart=settings.restart, settled_s=settings.restart_settled_s)
        )
        if not await self._wait_unless_stopped(starting, serving):
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            return self._exit_status(serving)
        try:
            service.client = starting.result()
        except EngineDead as error:
            logger.error("the engine did not start: %s", error)
            return 1
        self._on_ready(service)

        dying = asyncio.create_task(service.client.wait_dead())
        if await self._wait_unless_stopped(dying, serving):
            return await self._linger_after_death(dying.result())
        if serving.done():
            return self._exit_status(serving)
        service.draining.set()
        logger.info("draining")
        idle = asyncio.create_task(service.wait_idle())
        forced = asyncio.create_task(self._force.wait())
        try:
            await asyncio.wait(
                {idle, forced, dying},
                timeout=settings.drain_timeout_s,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if dying.done():
                return await self._linger_after_death(dying.result())
            if not idle.done():
                logger.warning("aborting the %d requests that still run", service.client.live)
                service.client.abort_all()
                await asyncio.wait({idle}, timeout=_CLOSE_S)
            return 1 if forced.done() else 0
        finally:
            for task in (idle, forced, dying):
                task.cancel()

    async def _wait_unless_stopped(self, event: asyncio.Task[object], serving: asyncio.Task[None]) -> bool:
        """Wait for `event`. Returns False if a signal or the end of the HTTP server comes first."""
        stop = asyncio.create_task(self._stop.wait())
        await asyncio.wait({event, stop, serving}, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        return event.done()

    async def _linger_after_death(self, reason: str) -> int:
        logger.error("the engine is gone: %s", reason)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DEAD_LINGER_S):
                await self._force.wait()
        return 1

    def _exit_status(self, serving: asyncio.Task[None]) -> int:
        if not serving.done():
            return 0  # a signal while loading
        logger.error("the HTTP server ended by itself", exc_info=serving.exception())
        return 1
