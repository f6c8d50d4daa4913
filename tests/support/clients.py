"""Clients of engine processes that run a FakeEngine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from engine.config.deployment import EngineConfig
from engine.messages import AddRequest, RequestOutput
from engine.processes.client import EngineClient
from tests.support.fake_engine import COMMAND

Test = Callable[[EngineClient], Coroutine[Any, Any, None]]


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


async def collect(client: EngineClient, wanted: AddRequest) -> list[RequestOutput]:
    return [output async for output in client.generate(wanted)]
