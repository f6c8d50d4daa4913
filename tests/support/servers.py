"""Real `magicdec serve` processes, and clients for them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from tests.support.paths import ROOT

PATIENCE_S = 120.0
"""Time after which a test fails. Nothing is expected to take nearly this long."""

PLAIN: dict[str, Any] = {"timeout": PATIENCE_S, "verify": False}
"""Options of httpx for servers without TLS: to load the certificates of authorities takes longer than most requests."""

TINY_SETTINGS: dict[str, Any] = {
    "engine": {
        "dtype": "float64",
        "threads": 1,
        "check_invariants": True,
        "cache": {"page_size": 16, "num_pages": 2048},
        "speculation": {"gamma": 3, "drafter": "together", "kv": {"budget": 64}},
    },
    "server": {"max_body_mb": 0.25},
}
"""Settings for the tiny model: float64, so that a batch's sums cannot differ from a single row's."""


@dataclass
class Server:
    """A server process. tmp: directory for temporary files of the server and its engine."""

    process: subprocess.Popen[str]
    url: str
    ready_line: str
    tmp: Path
    log: Path
    family: list[psutil.Process] = field(default_factory=list)

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.url.partition("://")[2].split(":")
        return host, int(port)

    @property
    def engine(self) -> psutil.Process:
        (engine,) = psutil.Process(self.process.pid).children()
        return engine

    def everyone(self) -> list[psutil.Process]:
        """Processes of the engine and all its ranks."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def files(self) -> int:
        """Number of files and sockets that the server has open, without connections of HTTP clients."""
        api = psutil.Process(self.process.pid)
        return api.num_fds() - len(api.net_connections("tcp"))

    def idle(self) -> bool:
        """Whether nothing runs, nothing waits, and every page is free."""
        load = self.load()
        return (load["running"], load["waiting"]) == (0, 0) and load["pages_free"] == load["pages_total"]

    def metric(self, name: str) -> float:
        """Value of a metric whose only label is the model."""
        found = re.search(rf"^{name}{{[^,}}]*}} (\S+)$", self.get("/metrics").text, re.MULTILINE)
        assert found, name
        return float(found[1])

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, **PLAIN)

    def post(self, path: str, body: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, **PLAIN)

    def load(self) -> dict[str, int]:
        answer: dict[str, int] = self.get("/load").raise_for_status().json()
        return answer

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        """Wait for the server to exit and assert that it left no process and no file. Returns the exit status."""
        status = self.process.wait(PATIENCE_S)
        _, alive = psutil.wait_procs(self.family, PATIENCE_S)
        assert alive == []
        eventually(lambda: list(self.tmp.iterdir()) == [])
        return status

    def stop(self) -> None:
        left = list(self.family)
        if self.process.poll() is None:
            left += [*self.everyone(), psutil.Process(self.process.pid)]
        for process in left:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait()


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.05)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from server.cli import main; main()", *arguments]


def environment(tmp: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp), "PYTHONUNBUFFERED": "1"}


def start(
    directory: Path,
    model: Path,
    *flags: str,
    config: dict[str, Any] | None = None,
    program: Callable[..., list[str]] = command,
) -> Server:
    """Start a server on a free port and wait until it accepts requests. program: builds the command line from
    arguments."""
    tmp = directory / "t"
    tmp.mkdir()
    settings = directory / "config.yaml"
    settings.write_text(yaml.safe_dump({"engine": {"model": str(model)}, **(config or {})}), encoding="utf-8")
    log = directory / "log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            program("serve", "--config", str(settings), "--model", str(model), "--port", "0", *flags),
            cwd=ROOT,
            env=environment(tmp),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.search(r"https?://127\.0\.0\.1:\d+", line)
    if found is None:
        process.kill()
        pytest.fail(f"the server did not start: {line!r}\n{log.read_text()}")
    server = Server(process, found[0], line, tmp, log)
    server.family = server.everyone()
    return server


class Stream(threading.Thread):
    """A streaming request in a thread of its own. events: its JSON chunks."""

    def __init__(self, server: Server, body: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self.status = 0
        self.events: list[Any] = []
        self.done = False
        self.error: Exception | None = None
        self._server, self._body = server, body
        self.start()

    def run(self) -> None:
        body = {**self._body, "stream": True}
        try:
            with httpx.stream("POST", self._server.url + "/v1/completions", json=body, **PLAIN) as answer:
                self.status = answer.status_code
                for line in answer.iter_lines():
                    if line == "data: [DONE]":
                        self.done = True
                    elif line.startswith("data: "):
                        self.events.append(json.loads(line.removeprefix("data: ")))
        except httpx.HTTPError as error:
            self.error = error

    def flowing(self) -> bool:
        return len(self.events) > 2
