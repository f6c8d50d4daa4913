"""Restarts a dead engine; a drop-in for EngineClient. Free of torch.

With `restart`, another engine replaces one that dies: requests that have no output of a round yet run once more on it,
all others end with the cause as their error. Without `restart`, the first death is final.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import aclosing

import msgspec

from engine.messages import FINISH_ABORT, AddRequest, ControlAction, EngineStats, Ready, RequestOutput
from engine.processes.client import EngineClient, EngineDead
from engine.scheduler.stats import add_totals

MAX_FAILED_STARTS = 5
"""Number of failed starts in a row after which no further start is tried."""
_BACKOFF_S = 1.0
"""Wait after the first failed start; it doubles with each further one."""

logger = logging.getLogger(__name__)


class EngineDown(EngineDead):
    """The engine is gone and is being restarted; the message gives the reason."""


class Supervisor:
    """Owner of an EngineClient, which another may replace. Use from one event loop.

    dead: reason why there will be no engine any more. down: reason why there is none until the restart.
    """

    def __init__(
        self, start: Callable[[], Awaitable[EngineClient]], client: EngineClient, *, restart: bool, settled_s: float
    ) -> None:
        """Use `start`, which waits for the first engine."""
        self._start = start
        self._client = client  # the newest, dead or alive; owned
        self._restart = restart
        self._settled_s = settled_s
        self._started_at = asyncio.get_running_loop().time()
        self._previous_totals = EngineStats()  # totals of the engines before this one
        self._waiting: dict[str, asyncio.Future[EngineClient | None]] = {}  # requests that wait for the next engine
        self._start_error: str | None = None  # how the latest attempt to start one failed
        self._dead: str | None = None
        self._death = asyncio.Event()
        self._task = asyncio.create_task(self._supervise())

    @classmethod
    async def start(
        cls, start: Callable[[], Awaitable[EngineClient]], *, restart: bool, settled_s: float
    ) -> Supervisor:
        """Start the first engine; if it does not start, no other is tried.

        start: starts one engine, or raises EngineDead. settled_s: an engine with a shorter life counts as a failed
        start. Raises EngineDead.
        """
        return cls(start, await start(), restart=restart, settled_s=settled_s)

    @property
    def ready(self) -> Ready:
        """The newest engine's first message."""
        return self._client.ready

    @property
    def dead(self) -> str | None:
        return self._dead if self._restart or self._dead else self._client.dead

    @property
    def down(self) -> str | None:
        if self._client.dead is None or self.dead is not None:
            return None
        return self._client.dead if self._start_error is None else f"{self._client.dead}; then: {self._start_error}"

    @property
    def live(self) -> int:
        """Number of requests that have not ended, including those that wait for an engine."""
        return self._client.live + len(self._waiting)

    @property
    def stats(self) -> EngineStats:
        """The newest gauges, and totals over all engines so far. Without an engine nothing runs and there are no
        pages."""
        stats = add_totals(self._client.stats, self._previous_totals)
        if self._client.dead is not None:
            nothing = {"running": 0, "pages_total": 0, "pages_free": 0, "pages_cached": 0}
            return msgspec.structs.replace(stats, waiting=len(self._waiting), **nothing)
        return stats

    async def generate(self, request: AddRequest) -> AsyncGenerator[RequestOutput, None]:
        """Yield the outputs of one request; see EngineClient.generate.

        If the engine dies before the first round's output, the request runs on the next engine, which acknowledges it
        again; only once, since the request itself may be the cause. Raises EngineDown if there was such an output, or
        if the request arrives while there is no engine; EngineDead if there will be none.
        """
        client = self._client
        if client.dead is not None:
            raise self._error(client)
        for last in (False, True):
            begun = False
            try:
                async with aclosing(client.generate(request)) as outputs:
                    async for output in outputs:
                        begun = begun or not output.queued
                        yield output
                return
            except EngineDead:
                if last or begun or not self._restart:
                    raise self._error(client) from None
            successor = await self._next_client(client, request.id)
            if successor is None:
                yield RequestOutput(id=request.id, finish_reason=FINISH_ABORT)
                return
            client = successor
            self._previous_totals.requests_retried += 1

    def abort(self, ids: Iterable[str]) -> None:
        """End these requests at once: their generators yield a last output with finish_reason "abort"."""
        ids = list(ids)
        self._client.abort(ids)
        for waiting in [self._waiting[id] for id in ids if id in self._waiting]:
            if not waiting.done():
                waiting.set_result(None)

    def abort_all(self) -> None:
        self._client.abort_all()
        self.abort(list(self._waiting))

    def reset_prefix_cache(self) -> None:
        """Empty the engine's prefix cache; see EngineClient.reset_prefix_cache. Raises EngineDown while there is no
        engine, EngineDead if there will be none."""
        client = self._client
        if client.dead is not None:
            raise self._error(client)
        client.reset_prefix_cache()

    async def control(self, action: ControlAction, *, abort: bool = False, path: str = "") -> None:
        """Change the engine's state or weights; see EngineClient.control. Raises ControlRefused, EngineDown,
        EngineDead."""
        client = self._client
        try:
            await client.control(action, abort=abort, path=path)
        except EngineDead:
            raise self._error(client) from None

    async def wait_dead(self) -> str:
        """Return the reason once the engine is gone for good."""
        await self._death.wait()
        assert self.dead is not None
        return self.dead

    async def close(self) -> None:
        """End the engine, or the attempt to start one; nothing of it remains. Live requests raise EngineDead."""
        self._end_for_good(self.dead or "the engine was stopped")
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self._client.close()

    def kill(self) -> None:
        """Kill the engine."""
        self._client.kill()

    # -- replacing the engine ------------------------------------------------------------------------------------------

    async def _supervise(self) -> None:
        failed = 0
        while True:
            reason = await self._client.wait_dead()
            if not self._restart:
                return self._end_for_good(reason)
            lived = asyncio.get_running_loop().time() - self._started_at
            failed = 0 if lived >= self._settled_s else failed + 1
            logger.error("the engine is gone: %s", reason)
            await self._client.close()  # free its resources before the next one needs them
            client = None
            while client is None:
                if failed >= MAX_FAILED_STARTS:
                    return self._end_for_good(f"{self.down} ({failed} starts in a row have failed)")
                if failed:
                    await asyncio.sleep(_BACKOFF_S * 2 ** (failed - 1))
                logger.warning("starting the engine again")
                try:
                    client = await self._start()
                except Exception as error:
                    failed += 1
                    self._start_error = str(error) or type(error).__name__
                    logger.error("the engine did not start: %s", self._start_error)
            self._replace_client(client)

    def _replace_client(self, client: EngineClient) -> None:
        self._previous_totals = add_totals(self._client.stats, self._previous_totals)
        self._previous_totals.engine_restarts += 1
        self._client, self._start_error = client, None
        self._started_at = asyncio.get_running_loop().time()
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_result(client)

    async def _next_client(self, client: EngineClient, id: str) -> EngineClient | None:
        """Wait for the engine after `client`; None if the request is aborted meanwhile. Raises EngineDead."""
        if self.dead is not None:
            raise EngineDead(self.dead)
        if self._client is not client:
            return self._client
        self._waiting[id] = asyncio.get_running_loop().create_future()
        try:
            return await self._waiting[id]
        finally:
            del self._waiting[id]

    def _error(self, client: EngineClient) -> EngineDead:
        return EngineDead(self.dead) if self.dead is not None else EngineDown(client.dead)

    def _end_for_good(self, reason: str) -> None:
        self._dead = reason
        self._death.set()
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(EngineDead(reason))
