"""Ranks started by a launcher like torchrun: processes that find each other by environment variables alone."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.config.deployment import EngineConfig
from engine.core import Engine
from engine.messages import AddRequest
from engine.params import SamplingParams
from engine.processes.client import EngineClient
from tests.support.engines import complete
from tests.support.paths import ROOT
from tests.support.profiles import is_all, only_in_all, whole_test_only_in_all
from tests.support.ranks import PROCESS_MODEL, settings, write_random_model

PROMPT = list(range(3, 40))
SIZE = 3 if is_all() else 2
"""Number of ranks: each is a process that takes long to start."""
PARAMS = SamplingParams(max_tokens=20, temperature=1.0, seed=4, ignore_eos=True)


@pytest.fixture(scope="module")
def random_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("models") / "random", PROCESS_MODEL)


class Group:
    """Ranks, each in its directory of `places`; rank 0 hosts the store."""

    def __init__(self, directory: Path, places: list[Path], config: dict[str, Any]) -> None:
        self.socket = directory / "e"
        (directory / "c.yaml").write_text(yaml.safe_dump({"engine": config}), encoding="utf-8")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        size = str(len(places))
        shared = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, "-m", "engine.processes.torchrun", "--config", str(directory / "c.yaml")]
        self.ranks = [
            subprocess.Popen(
                [*command, "--socket", str(self.socket)],
                cwd=place,
                env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank, place in enumerate(places)
        ]

    def ended(self) -> tuple[list[int], list[str]]:
        """Wait for all ranks to exit. Returns the exit status and the standard error of each."""
        said = [rank.communicate(timeout=120)[1] for rank in self.ranks]
        assert not self.socket.exists()
        return [rank.returncode for rank in self.ranks], said


@pytest.fixture
def group(tmp_path: Path, random_dir: Path) -> Iterator[Callable[..., Group]]:
    running: list[Group] = []

    def start(*places: Path, **others: Any) -> Group:
        config = settings(2, model=str(random_dir), dtype="float64", max_model_len=None, threads=1)
        running.append(Group(tmp_path, list(places) or [ROOT] * SIZE, config | others))
        return running[-1]

    yield start
    for started in running:
        for rank in started.ranks:
            rank.kill()
            rank.communicate()


def served(group: Group) -> list[int]:
    """Attach to the engine and return its output tokens for PROMPT."""

    async def main() -> list[int]:
        client = await EngineClient.attach(group.socket, model="random", start_timeout_s=120, timeout_s=60)
        try:
            request = AddRequest("r", PROMPT, PARAMS)
            return [token async for output in client.generate(request) for token in output.tokens]
        finally:
            await client.close()

    return asyncio.run(main())


@pytest.mark.parametrize("collectives", ["auto", only_in_all("gloo")])
def test_one_host(random_dir: Path, group: Callable[..., Group], collectives: str) -> None:
    """All ranks are on one host, so shared memory works too. Rank 0 gets the signal, and the other ranks end with
    it."""
    plain = Engine(EngineConfig.model_validate(settings(0, model=str(random_dir), dtype="float64")), progress=False)
    expected = complete(plain, PROMPT, PARAMS)
    plain.close()
    ranks = group(collectives=collectives)
    assert served(ranks) == expected
    ranks.ranks[0].send_signal(signal.SIGTERM)
    assert ranks.ended()[0] == [0] + [1] * (SIZE - 1)


@whole_test_only_in_all
def test_a_signal_for_one_rank(group: Callable[..., Group]) -> None:
    ranks = group()
    served(ranks)
    ranks.ranks[2].send_signal(signal.SIGTERM)
    status, said = ranks.ended()
    assert status == [1, 1, 1]
    assert f"rank 2 (host {socket.gethostname()}) got a signal to end" in said[0]


def test_a_host_without_the_model(tmp_path: Path, random_dir: Path, group: Callable[..., Group]) -> None:
    ranks = group(random_dir.parent, tmp_path, model="random")
    status, said = ranks.ended()
    assert status == [1, 1]
    assert f"rank 1 (host {socket.gethostname()}) failed: ModelError: random" in said[0]


def test_a_setting_for_another_number_of_ranks(group: Callable[..., Group]) -> None:
    size = 2 if is_all() else 1
    status, said = group(*[ROOT] * size, tensor_parallel_size=3).ended()
    assert status == [2] * size
    reason = f"engine.tensor_parallel_size: 3, but torchrun has started {size} ranks; leave it out"
    assert said == [f"error: {reason}\n"] * size


@whole_test_only_in_all
def test_a_transport_that_cannot_be(group: Callable[..., Group]) -> None:
    status, said = group(ROOT, ROOT, collectives="nccl").ended()
    assert status == [1, 1]
    assert "engine.collectives: nccl does not support the device cpu" in said[0]
