"""Servers that clients run against, and settings that keep clients from contacting other hosts.

`make test-clients` runs these tests, in environments of their own (openai2.txt, openai3.txt) that lack the server's
packages: the servers run in .venv. Clients whose packages an environment lacks are left out there.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.support.client_servers import ScriptedServer, command, serving_script
from tests.support.private_cache import use_private_cache
from tests.support.servers import PATIENCE_S, Server, start

use_private_cache()
os.environ |= {
    "ANONYMIZED_TELEMETRY": "false",
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "LANGCHAIN_TRACING_V2": "false",
    "LANGSMITH_TRACING": "false",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # otherwise importing it accesses the network
    "LITELLM_TELEMETRY": "False",
    "OPENAI_AGENTS_DISABLE_TRACING": "1",
}

# Clients may know more ways to other hosts than these settings.
_get_address = socket.getaddrinfo


def _get_local_address(host: Any, *arguments: Any, **options: Any) -> Any:
    assert host in (None, "127.0.0.1", "localhost", b"127.0.0.1"), f"a client looks up {host}"
    return _get_address(host, *arguments, **options)


socket.getaddrinfo = _get_local_address

PACKAGES = {
    "test_agents.py": "agents",
    "test_anthropic.py": "anthropic",
    "test_instructor.py": "instructor",
    "test_langchain.py": "langchain_openai",
    "test_litellm_tools.py": "litellm",
    "test_llama_index.py": "llama_index",
    "test_pydantic_ai.py": "pydantic_ai",
    "test_smolagents.py": "smolagents",
}
collect_ignore = [file for file, package in PACKAGES.items() if find_spec(package) is None]


@pytest.fixture(scope="session")
def _scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedServer]:
    with serving_script(tmp_path_factory.mktemp("scripted")) as server:
        yield server


@pytest.fixture
def scripted(_scripted: ScriptedServer) -> ScriptedServer:
    """Server of a model whose answers a test writes."""
    _scripted.answer()
    return _scripted


@pytest.fixture
def client(scripted: ScriptedServer) -> openai.OpenAI:
    """OpenAI's own client of the scripted model."""
    return openai.OpenAI(base_url=scripted.url, api_key="none", timeout=PATIENCE_S, max_retries=0)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Server of the default model. gamma is fixed, so that no time is spent on measuring."""
    config = {"engine": {"cache": {"memory_gb": 0.5}, "speculation": {"gamma": 3}}}
    flags = ("--dtype", "float32", "--served-model-name", "default")
    running = start(tmp_path_factory.mktemp("server"), Path("default"), *flags, config=config, program=command)
    yield running
    running.stop()
