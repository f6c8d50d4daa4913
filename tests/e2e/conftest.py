"""Fixtures that run real `magicdec serve` processes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.support.servers import PATIENCE_S, TINY_SETTINGS, Server, start
from tests.support.tiny import TEMPLATE, write_model, write_tokenizer


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[Server]:
    """Server of the default model in float32. gamma is fixed, since the best gamma depends on the machine's other
    load."""
    engine = {"threads": 2, "cache": {"memory_gb": 0.5}, "check_invariants": True, "speculation": {"gamma": 3}}
    config = {"engine": engine}
    flags = ("--dtype", "float32", "--max-model-len", "2048", "--served-model-name", "default")
    running = start(tmp_path_factory.mktemp("server"), model_dir, *flags, config=config)
    yield running
    running.stop()


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[openai.OpenAI]:
    """OpenAI's own client of the default model."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=PATIENCE_S, max_retries=0) as client:
        yield client


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny") / "tiny", max_model_len=4352)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Server]:
    """Server of a fast model whose text is noise."""
    running = start(tmp_path_factory.mktemp("tiny-server"), tiny_model, config=TINY_SETTINGS)
    yield running
    running.stop()


@pytest.fixture(scope="session")
def thinker(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Server]:
    """Server of the tiny model with a template after which it thinks, most likely without an end."""
    directory = tmp_path_factory.mktemp("thinker")
    model = shutil.copytree(tiny_model, directory / "tiny")
    write_tokenizer(model, chat_template=TEMPLATE + "<think>{# </think> #}")
    running = start(directory, model, config=TINY_SETTINGS)
    yield running
    running.stop()


@pytest.fixture
def launch(tmp_path: Path, tiny_model: Path) -> Iterator[Callable[..., Server]]:
    """Return a function that starts servers of the tiny model; launch(drain_timeout_s=1.0, …) sets `server.`
    settings."""
    running: list[Server] = []

    def start_one(*flags: str, **settings: Any) -> Server:
        directory = tmp_path / str(len(running))
        directory.mkdir()
        config = {**TINY_SETTINGS, "server": {**TINY_SETTINGS["server"], **settings}}
        running.append(start(directory, tiny_model, *flags, config=config))
        return running[-1]

    yield start_one
    for server in running:
        server.stop()
