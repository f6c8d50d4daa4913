"""What the server says about its model."""

from __future__ import annotations

import asyncio
from pathlib import Path

from engine.config.target_reading import TargetQuestConfig
from tests.support.app import FakeClient, server
from tests.support.fake_engine import FakeEngine


def test_a_target_that_reads_less_is_named(directory: Path) -> None:
    """The engine's settings count, not those of this process: it may have attached to an engine."""

    def lossy(client: FakeClient) -> None:
        stats = FakeEngine.stats(client.engine)
        stats.target_kv = TargetQuestConfig(policy="quest", budget=512, heads="/models/heads.json").summary
        client.engine.stats = lambda: stats  # type: ignore[method-assign]

    async def main() -> None:
        async with server(directory) as (http, client, _):
            (dense,) = (await http.get("/v1/models")).json()["data"]
            assert dense["magicdec"] == {"target_kv": None, "weights": None, "kv_format": "dense"}
            assert "target_kv" not in (await http.get("/metrics")).text
            lossy(client)
            (card,) = (await http.get("/v1/models")).json()["data"]
            told = {"policy": "quest", "budget": 512, "sink": 16, "interval": 4, "streaming_window": 256}
            assert card == dense | {"magicdec": dense["magicdec"] | {"target_kv": told}}
            assert card == (await http.get("/v1/models/tiny")).json()
            labels = 'budget="512",interval="4",model_name="tiny",policy="quest",sink="16",streaming_window="256"'
            assert f"magicdec_target_kv_info{{{labels}}} 1.0" in (await http.get("/metrics")).text.splitlines()

    asyncio.run(main())


def test_formats_of_weights_are_named(directory: Path) -> None:
    """Those of the loaded models, not the settings."""

    async def main() -> None:
        async with server(directory) as (http, client, _):
            assert "magicdec_weights_info" not in (await http.get("/metrics")).text
            stats, formats = FakeEngine.stats(client.engine), {"target": "int4 (as stored)", "drafts": "int8"}
            stats.weights = formats
            client.engine.stats = lambda: stats  # type: ignore[method-assign]
            (card,) = (await http.get("/v1/models")).json()["data"]
            assert card["magicdec"]["weights"] == formats
            labels = 'drafts="int8",model_name="tiny",target="int4 (as stored)"'
            assert f"magicdec_weights_info{{{labels}}} 1.0" in (await http.get("/metrics")).text.splitlines()

    asyncio.run(main())


def test_the_format_of_kv_is_named(directory: Path) -> None:
    """Like weights, but also where the text is the dense model's."""

    async def main() -> None:
        async with server(directory) as (http, client, _):
            line = 'magicdec_kv_format_info{format="dense",model_name="tiny"} 1.0'
            assert line in (await http.get("/metrics")).text.splitlines()
            stats = FakeEngine.stats(client.engine)
            stats.kv_format = "int4x2"
            client.engine.stats = lambda: stats  # type: ignore[method-assign]
            (card,) = (await http.get("/v1/models")).json()["data"]
            assert card["magicdec"]["kv_format"] == "int4x2"
            assert line.replace("dense", "int4x2") in (await http.get("/metrics")).text.splitlines()

    asyncio.run(main())
