"""Start and shutdown of a server."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.support.paths import ROOT
from tests.support.profiles import is_all, whole_test_only_in_all
from tests.support.servers import PATIENCE_S, Server, Stream, command, environment, eventually

Launch = Callable[..., Server]
LONG = {"prompt": "abc", "max_tokens": 4000, "ignore_eos": True, "seed": 1}


def running(server: Server, body: dict[str, Any] = LONG, count: int = 1) -> list[Stream]:
    streams = [Stream(server, body) for _ in range(count)]
    eventually(lambda: all(stream.flowing() for stream in streams))
    return streams


def ended(stream: Stream) -> Stream:
    stream.join(PATIENCE_S)
    assert not stream.is_alive()
    assert stream.error is None
    return stream


def test_a_signal_drains(launch: Launch) -> None:
    server = launch(drain_timeout_s=PATIENCE_S)
    (stream,) = running(server, {**LONG, "max_tokens": 1500 if is_all() else 250})
    server.signal(signal.SIGTERM)
    eventually(lambda: server.get("/ready").status_code == 503)
    refused = server.post("/v1/completions", {"prompt": "x"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
    assert "retry-after" in refused.headers
    assert server.get("/health").status_code == 200
    assert stream.is_alive()
    last = ended(stream).events[-1]
    assert (stream.done, last["choices"][0]["finish_reason"]) == (True, "length")
    assert server.wait() == 0


def test_what_does_not_finish_in_time_is_aborted(launch: Launch) -> None:
    server = launch(drain_timeout_s=0.2)
    streams = running(server, count=3)
    server.signal(signal.SIGTERM)
    for stream in streams:
        assert ended(stream).events[-1]["choices"][0]["finish_reason"] == "abort"
        assert stream.done
    assert server.wait() == 0


def test_a_second_signal_ends_at_once(launch: Launch) -> None:
    server = launch(drain_timeout_s=10_000)
    streams = running(server)
    server.signal(signal.SIGTERM)
    eventually(lambda: server.get("/ready").status_code == 503)
    server.signal(signal.SIGTERM)
    assert server.wait() == 1
    streams[0].join(PATIENCE_S)
    assert not streams[0].is_alive()


@whole_test_only_in_all
def test_a_second_signal_while_the_engine_does_not_end(launch: Launch) -> None:
    server = launch()
    engine = server.engine
    engine.suspend()
    server.signal(signal.SIGTERM)

    def closed() -> bool:
        try:
            server.get("/ready")
        except httpx.TransportError:
            return True
        return False

    eventually(closed)
    server.signal(signal.SIGTERM)
    assert server.wait() == 1


@whole_test_only_in_all
def test_ctrl_c_while_idle(launch: Launch) -> None:
    server = launch()
    server.signal(signal.SIGINT)
    assert server.wait() == 0


def test_an_engine_that_is_killed(launch: Launch) -> None:
    server = launch()
    streams = running(server, count=2)
    whole: list[httpx.Response] = []
    waiting = threading.Thread(target=lambda: whole.append(server.post("/v1/completions", LONG)))
    waiting.start()
    eventually(lambda: server.load()["running"] == 3)
    server.engine.kill()
    for stream in streams:
        assert ended(stream).events[-1]["error"]["code"] == "engine_dead"
        assert stream.done
    waiting.join(PATIENCE_S)
    assert (whole[0].status_code, whole[0].json()["error"]["code"]) == (503, "engine_dead")
    health = server.get("/health")
    assert (health.status_code, health.json()["error"]["code"]) == (503, "engine_dead")
    assert server.get("/ready").status_code == 503
    assert server.wait() == 1


@whole_test_only_in_all
def test_an_engine_that_stands_still_when_its_server_is_killed(launch: Launch) -> None:
    server = launch()
    engine = server.engine
    engine.suspend()
    eventually(lambda: engine.status() == psutil.STATUS_STOPPED)  # on a busy machine this takes a moment
    server.process.kill()
    _, alive = psutil.wait_procs(server.family, PATIENCE_S)
    assert alive == []


def test_an_engine_that_stands_still(launch: Launch) -> None:
    server = launch(engine_timeout_s=10_000.0)
    server.engine.suspend()
    eventually(lambda: server.get("/health").status_code == 503)
    assert "silent" in server.get("/health").json()["error"]["message"]
    assert server.wait() == 1


def test_a_signal_during_an_upload(launch: Launch) -> None:
    server = launch()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as upload:
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 100\r\n\r\n"
        upload.sendall(head)
        assert upload.recv(100).startswith(b"HTTP/1.1 100")  # the server now waits for the body
        upload.sendall(b"{")
        server.signal(signal.SIGTERM)
        answer = upload.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 503")
    assert b'"draining"' in answer
    assert server.wait() == 0
    assert "Traceback" not in server.log.read_text()


def test_a_server_that_is_killed_leaves_no_engine(launch: Launch) -> None:
    server = launch()
    running(server)
    os.kill(server.process.pid, signal.SIGKILL)
    assert server.wait() == -signal.SIGKILL


def test_what_a_killed_server_left_does_not_matter(launch: Launch) -> None:
    """Both processes are killed at once, so that neither cleans up. The next server starts despite the leftover
    socket."""
    first = launch()
    engine = first.engine
    (left,) = first.tmp.iterdir()
    for process in (psutil.Process(first.process.pid), engine):
        process.suspend()
    for process in (psutil.Process(first.process.pid), engine):
        process.kill()
    first.process.wait(PATIENCE_S)
    assert left.exists()
    second = launch()
    assert second.post("/v1/completions", {"prompt": "x"}).status_code == 200
    second.signal(signal.SIGTERM if is_all() else signal.SIGINT)
    assert second.wait() == 0


def test_a_signal_while_loading(tmp_path: Path, tiny_model: Path) -> None:
    tmp = tmp_path / "t"
    tmp.mkdir()
    process = subprocess.Popen(
        command("serve", "--model", str(tiny_model), "--port", "0"),
        cwd=ROOT,
        env=environment(tmp),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )

    def engines() -> list[psutil.Process]:
        """Return the engine processes; other children, such as git for the version, come and go."""
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(process.pid).children()
            return [child for child in children if "engine.processes.engine_server" in child.cmdline()]
        return []

    eventually(lambda: len(engines()) == 1)
    (engine,) = engines()
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, output) == (0, "")
    assert not engine.is_running()
    assert list(tmp.iterdir()) == []


def refused(*arguments: str) -> str:
    """Run a command that must fail. Returns its error output."""
    done = subprocess.run(
        command("serve", *arguments), cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert done.returncode != 0
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    return done.stderr


def test_settings_that_cannot_work(tmp_path: Path, tiny_model: Path) -> None:
    model = ("--model", str(tiny_model))
    assert "no-such-dir" in refused("--model", str(tmp_path / "no-such-dir"))
    if is_all():
        assert "budget" in refused(*model, "--budget", "7")
        assert "off" in refused(*model, "--speculation", "maybe")
        assert "gamma" in refused(*model, "--speculation", "99")
        assert "dtype" in refused(*model, "--dtype", "int3")
        unknown = tmp_path / "c.yaml"
        unknown.write_text("engine: {model: x, pages: 5}\n")
        assert "engine.pages: unknown setting" in refused("--config", str(unknown))
        assert "max_model_len" in refused(*model, "--port", "0", "--max-model-len", "999999")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "cannot listen" in refused(*model, "--port", str(taken.getsockname()[1]))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    assert "tokenizer.json" in refused("--model", str(broken))
