"""Pause, changes of weights and sleep through EngineClient and the engine process, over a FakeEngine."""

from __future__ import annotations

import asyncio

import pytest

from engine.config.deployment import EngineConfig
from engine.messages import EngineState
from engine.processes.client import ControlRefused, EngineClient, EngineDead
from engine.processes.supervisor import EngineDown, Supervisor
from tests.support.clients import collect, eventually, run, tokens_of
from tests.support.fake_engine import (
    BAD_WEIGHTS,
    COMMAND,
    FATAL_WEIGHTS,
    HANGING_WEIGHTS,
    SLOW,
    SLOW_WEIGHTS,
    expected,
    request,
)

pytestmark = pytest.mark.usefixtures("own_tmp")


def test_a_paused_engine_keeps_requests_until_it_goes_on() -> None:
    async def test(client: EngineClient) -> None:
        wanted = request([SLOW], max_tokens=30)
        running = asyncio.create_task(tokens_of(client, wanted))
        await eventually(lambda: client.stats.running == 1)
        await client.control("pause")
        assert client.stats.state is EngineState.PAUSED
        queued = asyncio.create_task(collect(client, request([1], max_tokens=5)))
        await eventually(lambda: client.stats.running == 2)
        done = client.stats.generated_tokens
        await client.control("pause")
        assert (client.stats.generated_tokens, client.stats.rounds) == (done, client.stats.rounds)
        assert not running.done()
        await client.control("resume")
        assert await running == expected(wanted)
        assert (await queued)[-1].finish_reason == "length"

    run(test)


def test_a_pause_may_abort() -> None:
    async def test(client: EngineClient) -> None:
        running = asyncio.create_task(collect(client, request([SLOW], max_tokens=1000)))
        await eventually(lambda: client.stats.running == 1)
        await client.control("pause", abort=True)
        assert (await running)[-1].finish_reason == "abort"
        assert (client.live, client.stats.running) == (0, 0)
        await client.control("resume")
        assert await tokens_of(client, request([1], max_tokens=5, seed=2))

    run(test)


def test_concurrent_controls_get_their_own_answers() -> None:
    async def test(client: EngineClient) -> None:
        paths = ["/one", BAD_WEIGHTS, "/two", BAD_WEIGHTS, "/three"]
        asked = [client.control("update_weights", path=path) for path in paths]
        answers = await asyncio.gather(*asked, client.control("sleep"), return_exceptions=True)
        refused = [isinstance(answer, ControlRefused) for answer in answers]
        assert refused == [False, True, False, True, False, False]
        assert str(answers[1]) == f"{BAD_WEIGHTS}: not these"
        assert client.stats.state is EngineState.ASLEEP

    run(test)


def test_an_engine_that_dies_of_new_weights() -> None:
    async def test(client: EngineClient) -> None:
        with pytest.raises(EngineDead, match="cannot be loaded back"):
            await client.control("update_weights", path=FATAL_WEIGHTS)
        with pytest.raises(EngineDead, match="cannot be loaded back"):
            await client.control("pause")

    run(test)


def test_an_engine_may_load_weights_longer_than_a_round_but_not_forever() -> None:
    async def test(client: EngineClient) -> None:
        await client.control("update_weights", path=SLOW_WEIGHTS)
        assert client.dead is None

    run(test, timeout_s=1, start_timeout_s=30)

    async def hangs(client: EngineClient) -> None:
        with pytest.raises(EngineDead, match="loading weights for more than"):
            await client.control("update_weights", path=HANGING_WEIGHTS)

    run(hangs, start_timeout_s=5)


@pytest.mark.parametrize("restart", [True, False])
def test_a_supervisor_passes_controls_on_while_there_is_an_engine(restart: bool) -> None:
    async def start() -> EngineClient:
        return await EngineClient.start(EngineConfig(model="fake"), start_timeout_s=30, timeout_s=30, command=COMMAND)

    async def main() -> None:
        async with asyncio.timeout(60):
            engines = await Supervisor.start(start, restart=restart, settled_s=0)
            try:
                await engines.control("pause")
                assert engines.stats.state is EngineState.PAUSED
                with pytest.raises(ControlRefused, match="not these"):
                    await engines.control("update_weights", path=BAD_WEIGHTS)
                engines.kill()
                with pytest.raises(EngineDead) as caught:
                    await engines.control("resume")
                assert isinstance(caught.value, EngineDown) is restart
            finally:
                await engines.close()

    asyncio.run(main())
