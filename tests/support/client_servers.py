"""Servers for tests of clients, which run in environments without the server's packages."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import httpx
from pydantic import BaseModel, ConfigDict

from tests.support.paths import ROOT
from tests.support.servers import PLAIN, environment

PYTHON = str(ROOT / ".venv" / "bin" / "python")
"""Interpreter of the servers."""
WEATHER_CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Ulm"}}\n</tool_call>'
"""A call as the scripted model writes it."""


class City(BaseModel):
    """A city."""

    model_config = ConfigDict(extra="forbid")  # else a small model may add properties without end

    name: Literal["Paris", "London", "Lima"]
    continent: Literal["Africa", "America", "Europe"]


def command(*arguments: str) -> list[str]:
    """Return the command line of `magicdec` with these arguments."""
    return [PYTHON, "-c", "from server.cli import main; main()", *arguments]


class ScriptedServer:
    """A server whose model answers with given texts. url: with /v1."""

    model = "scripted"

    def __init__(self, root: str) -> None:
        self.root, self.url = root, root + "/v1"

    def answer(self, *texts: str) -> None:
        """Answer the next requests with these texts, and forget the requests so far."""
        httpx.post(self.root + "/script", json=texts, **PLAIN).raise_for_status()

    def requests(self, name: str) -> list[str]:
        """Return `prompts` or `grammars` of the requests since `answer`, all of whose texts must be used up."""
        report = httpx.get(self.root + "/script", **PLAIN).json()
        assert report["left"] == 0
        found: list[str] = report[name]
        return found

    def prompts(self) -> list[str]:
        return self.requests("prompts")


@contextmanager
def serving_script(directory: Path) -> Iterator[ScriptedServer]:
    """Run tests/support/scripted_server.py."""
    process = subprocess.Popen(
        [PYTHON, "-m", "tests.support.scripted_server", str(directory)],
        cwd=ROOT,
        env=environment(directory),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url, "the server did not start"
        yield ScriptedServer(url)
    finally:
        process.kill()
        process.wait()
