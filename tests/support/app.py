"""The HTTP application over a FakeEngine in the same process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import httpx

from engine.config.deployment import Config, EngineConfig, SchedulerConfig, ServerConfig
from engine.messages import RETRY_FULL, AddRequest, ControlAction, RequestOutput
from engine.processes.client import ControlRefused, EngineDead
from engine.processes.supervisor import Supervisor
from engine.ranks.resident_weights import WeightsRefused
from models.tokenizer import Tokenizer
from server.app import create_app
from server.service import Service
from tests.support.fake_engine import FakeEngine


class FakeClient:
    """Stand-in for a Supervisor: each request runs on a FakeEngine of its own, one step per output;
    all of them have one prefix cache."""

    def __init__(self) -> None:
        self.engine = FakeEngine(EngineConfig(model="fake"))
        self.ready = self.engine.ready
        self.dead: str | None = None
        self.down: str | None = None
        self.aborted: list[str] = []
        self.requests: list[AddRequest] = []
        self.controls: list[tuple[ControlAction, bool, str]] = []

    @property
    def stats(self) -> Any:
        return self.engine.stats()

    def reset_prefix_cache(self) -> None:
        if self.dead is not None:
            raise EngineDead(self.dead)
        self.engine.reset_prefix_cache()

    async def control(self, action: ControlAction, *, abort: bool = False, path: str = "") -> None:
        if self.dead is not None:
            raise EngineDead(self.dead)
        self.controls.append((action, abort, path))
        try:
            if action == "pause":
                self.engine.pause(abort)
            elif action == "update_weights":
                self.engine.update_weights(path)
            else:
                getattr(self.engine, action)()
        except WeightsRefused as error:
            raise ControlRefused(str(error)) from None

    async def generate(self, request: AddRequest) -> AsyncGenerator[RequestOutput, None]:
        if self.dead is not None:
            raise EngineDead(self.dead)
        self.requests.append(request)
        alone = FakeEngine(EngineConfig(model="fake"), prefix_cache=self.engine.prefix_cache)
        ended = False
        try:
            try:
                alone.add(request)
            except ValueError as error:
                retry = RETRY_FULL if type(error).__name__ == "QueueFull" else None
                yield RequestOutput(id=request.id, finish_reason="abort", error=str(error), retry=retry)
                return
            yield RequestOutput(id=request.id, queued=True)
            while not ended:
                await asyncio.sleep(0)
                try:
                    (output,) = alone.step()
                except RuntimeError as error:
                    self.dead = str(error)
                    raise EngineDead(self.dead) from None
                ended = output.finish_reason is not None
                yield output
        finally:
            if not ended:
                self.aborted.append(request.id)


@asynccontextmanager
async def server(
    directory: Path, client: FakeClient | None = None, **settings: Any
) -> AsyncIterator[tuple[httpx.AsyncClient, FakeClient, Service]]:
    """client: the engine; None: one that answers with tokens of its own."""
    config = Config(
        engine=EngineConfig(model=str(directory), scheduler=SchedulerConfig(max_rows=4, max_waiting=4)),
        server=ServerConfig(**{"served_model_name": ["tiny"], **settings}),
    )
    service = Service(config, Tokenizer(directory))
    client = client or FakeClient()
    service.client = cast(Supervisor, client)
    transport = httpx.ASGITransport(create_app(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        yield http, client, service
