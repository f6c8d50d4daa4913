"""An engine over two torchrun agents: both on this machine, and in network namespaces that act as hosts."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from engine.config.deployment import EngineConfig
from engine.llm import LLM
from engine.params import SamplingParams
from tests.support.paths import ROOT
from tests.support.profiles import is_all
from tests.support.ranks import PROCESS_MODEL, settings, write_random_model
from tests.support.servers import PATIENCE_S, Server, environment, eventually, start

MODEL = replace(PROCESS_MODEL, max_position_embeddings=4096)
PROMPT = list(range(3, 60))
IP = shutil.which("ip", path=f"{os.environ['PATH']}{os.pathsep}/usr/sbin{os.pathsep}/sbin")


@dataclass(frozen=True)
class Host:
    """Host of an agent. prefix: words before the agent's command. address: its IP address."""

    prefix: tuple[str, ...]
    address: str
    cable: tuple[str, ...] | None = None
    """Arguments of `ip` that select its one connection to other hosts."""


def ip(*arguments: str) -> None:
    subprocess.run([str(IP), *arguments], check=True, capture_output=True, text=True)


@cache
def can_have_namespaces() -> bool:
    """Whether `namespaces` can be made here; then they show all that `loopback` does."""
    try:
        with namespaces():
            return True
    except pytest.skip.Exception:
        return False


@contextlib.contextmanager
def namespaces() -> Iterator[tuple[Host, Host]]:
    """Two hosts with a cable between them. Skips the test if they cannot be created."""
    if IP is None:
        pytest.skip("no network namespaces: there is no command `ip`")
    names = [f"magicdec-{os.getpid()}-{end}" for end in "ab"]
    cable = [f"md{os.getpid()}{end}" for end in "ab"]  # at most 15 characters
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", cable[0], "netns", names[0], "type", "veth", "peer", cable[1], "netns", names[1])
            for number, (name, end) in enumerate(zip(names, cable, strict=True), 1):
                ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", end)
                ip("-n", name, "link", "set", end, "up")
                ip("-n", name, "link", "set", "lo", "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces: {error.stderr.strip()}")
        first, second = (
            Host((str(IP), "netns", "exec", name), f"10.77.0.{number}", ("-n", name, "link", "set", end))
            for number, (name, end) in enumerate(zip(names, cable, strict=True), 1)
        )
        yield first, second
    finally:
        for name in names:
            subprocess.run([IP, "netns", "delete", name], check=False, capture_output=True)


@contextlib.contextmanager
def loopback() -> Iterator[tuple[Host, Host]]:
    host = Host((), "127.0.0.1")
    yield host, host


class Agents:
    """torchrun on two hosts, two ranks each. `start_server` attaches a server to their engine."""

    def __init__(self, directory: Path, hosts: tuple[Host, Host], model: Path) -> None:
        self.directory, self.model = directory, model
        self.socket = directory / "engine"
        self.log = directory / "agents.log"
        self.config = {
            "engine": settings(2, model=str(model), dtype="float64", threads=1, max_model_len=None, step_timeout_s=3.0),
            "server": {"start_timeout_s": PATIENCE_S},
        }
        file = directory / "agents.yaml"
        file.write_text(yaml.safe_dump(self.config), encoding="utf-8")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self._servers = 0
        self._seen: set[psutil.Process] = set()
        self.processes: list[subprocess.Popen[bytes]] = []
        with self.log.open("wb") as log:
            for number, host in enumerate(hosts):
                command = [*host.prefix, sys.executable, "-m", "torch.distributed.run", "--nnodes=2"]
                command += ["--nproc-per-node=2", "--max-restarts=1", "--rdzv-backend=c10d"]
                command += [f"--rdzv-endpoint={hosts[0].address}:{port}", f"--rdzv-conf=is_host={int(number == 0)}"]
                command += [f"--local-addr={host.address}"]
                command += ["-m", "engine.processes.torchrun", "--config", str(file), "--socket", str(self.socket)]
                self.processes.append(
                    subprocess.Popen(
                        command,
                        cwd=ROOT,
                        env=environment(directory),
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL,
                        stderr=log,
                    )
                )

    def ranks(self) -> dict[int, psutil.Process]:
        """Processes of the ranks that run now, by rank."""
        found = {}
        for agent in self.processes:
            for process in psutil.Process(agent.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error, KeyError):
                    found[int(process.environ()["RANK"])] = process
        self._seen.update(found.values())
        return found

    def start_server(self) -> Server:
        self._servers += 1
        directory = self.directory / str(self._servers)
        directory.mkdir()
        return start(directory, self.model, "--engine", str(self.socket), config=self.config)

    def stop(self) -> None:
        """Stop the agents with SIGTERM, at the same time."""
        self.ranks()
        for process in self.processes:
            process.send_signal(signal.SIGTERM)
        for process in self.processes:
            process.wait(PATIENCE_S)

    def gone(self) -> None:
        """Check that no process and no file remains."""
        _, alive = psutil.wait_procs(self._seen, PATIENCE_S)
        assert alive == []
        assert not self.socket.exists()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def random_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("models") / "random", MODEL)


@pytest.fixture(scope="module")
def expected(random_dir: Path) -> str:
    """Output of a single rank for PROMPT."""
    chosen = EngineConfig.model_validate(settings(0, model=str(random_dir), dtype="float64", max_model_len=None))
    with LLM(chosen) as llm:
        (completion,) = llm.generate([PROMPT], SamplingParams(max_tokens=40, temperature=1.0, seed=5, ignore_eos=True))
    return completion.text


def completed(server: Server) -> Any:
    body = {"prompt": PROMPT, "max_tokens": 40, "temperature": 1.0, "seed": 5, "ignore_eos": True}
    return server.post("/v1/completions", body).raise_for_status().json()["choices"][0]["text"]


def interrupted(server: Server, interrupt: Callable[[], object]) -> str:
    """Interrupt the engine while a client waits. Returns the error message that the client receives."""
    answers: list[httpx.Response] = []
    long = {"prompt": PROMPT, "max_tokens": 4000, "ignore_eos": True}
    client = threading.Thread(target=lambda: answers.append(server.post("/v1/completions", long)))
    client.start()
    eventually(lambda: server.load()["running"] == 1)
    interrupt()
    client.join(PATIENCE_S)
    assert answers[0].status_code == 503
    error = answers[0].json()["error"]
    assert error["code"] == "engine_dead"
    return str(error["message"])


@pytest.mark.parametrize("where", [loopback, namespaces])
def test_two_hosts(
    where: Callable[[], contextlib.AbstractContextManager[tuple[Host, Host]]],
    tmp_path: Path,
    random_dir: Path,
    expected: str,
) -> None:
    """The text equals that of one rank. When a rank is killed, clients get an error and torchrun restarts all ranks. In
    the end nothing remains, whether the agents are stopped or cut off from each other. `make test` ends after the
    error."""
    if where is loopback and can_have_namespaces() and not is_all():
        pytest.skip("only in `make test-all`: namespaces show the same")
    servers = []
    with where() as hosts:
        agents = Agents(tmp_path, hosts, random_dir)
        try:
            servers.append(agents.start_server())
            assert completed(servers[0]) == expected
            ranks = agents.ranks()
            assert set(ranks) == {0, 1, 2, 3}
            reason = interrupted(servers[0], ranks[3].kill)
            assert "rank 3 (host " in reason
            assert "cannot be reached" in reason
            if not is_all():
                return

            servers[0].stop()
            servers.append(agents.start_server())
            assert completed(servers[1]) == expected
            assert set(agents.ranks().values()).isdisjoint(ranks.values())
            if hosts[0].cable is None:
                reason = interrupted(servers[1], agents.stop)
                assert "stopped" in reason or "got a signal to end" in reason
            else:
                # No connection is closed, so only silence shows that the other ranks are gone.
                cable = hosts[0].cable
                assert "rank" in interrupted(servers[1], lambda: ip(*cable, "down"))
                agents.kill()
            agents.gone()
        except BaseException:
            sys.stderr.write(agents.log.read_text(errors="replace"))
            raise
        finally:
            for server in servers:
                server.stop()
            agents.kill()
