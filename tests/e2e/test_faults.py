"""Any fault of any rank of a real server, in any phase: clear errors, a new engine, and nothing left over. After
running out of memory the same engine goes on.

`pytest tests/e2e/test_faults.py -s` prints the time to detect each fault and to serve again.
"""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.support.faulty import arm, command, fired
from tests.support.profiles import each_value, only_in_all, whole_test_only_in_all
from tests.support.ranks import SERVED_MODEL, write_random_model
from tests.support.servers import PATIENCE_S, Server, Stream, eventually, start

MODEL = replace(SERVED_MODEL, max_position_embeddings=4352)
SETTINGS: dict[str, Any] = {
    "engine": {
        "dtype": "float64",
        "tensor_parallel_size": 2,
        "threads": 1,
        "step_timeout_s": 1.0,
        "max_model_len": 4352,
        "check_invariants": True,
        "cache": {"page_size": 16, "num_pages": 1024},
        "scheduler": {"max_rows": 2, "max_batch_tokens": 64},
        "speculation": {"gamma": 3, "kv": {"budget": 64}},
    },
    "server": {"restart_settled_s": 0.0},
}
LONG = {"prompt": [5, 6, 7], "max_tokens": 4000, "ignore_eos": True, "seed": 1}
SHORT = {"prompt": list(range(10, 110)), "max_tokens": 12, "ignore_eos": True, "seed": 2, "temperature": 1.0}
COUNTERS = ("engine_restarts", "requests_retried", "rounds")
ENDS = {"SIGKILL": r"{} was killed by signal 9 \(SIGKILL\)", "exception": "{} failed: RuntimeError: a fault on purpose"}
RANK_1 = ENDS | {"SIGSTOP": r"{} did not answer within 1 s \(stopped by a signal\)"}
RANK_0 = ENDS | {
    "SIGKILL": "the engine process ended with status -9",
    "SIGSTOP": "the engine process was silent for 3 s",
}


@dataclass
class Site:
    """A server and its measurements. faults: directory where faults are armed. short: expected text of SHORT. files:
    number of open files when the server was new. table: rows of the printed table."""

    server: Server
    model: Path
    faults: Path
    short: str
    files: int
    table: list[str] = field(default_factory=list)


def faulty(place: Path, model: Path, *flags: str, **engine: Any) -> Site:
    """Start a server that restarts its engine, and computes every prompt whole, so that each phase is reached. engine:
    further engine settings."""
    faults = place / "f"
    faults.mkdir()

    def program(*arguments: str) -> list[str]:
        return command(faults, *arguments)

    config = SETTINGS | {"engine": SETTINGS["engine"] | engine}
    server = start(place, model, "--restart", "--no-prefix-cache", *flags, config=config, program=program)
    short = server.post("/v1/completions", SHORT).json()["choices"][0]["text"]
    return Site(server, model, faults, short, server.files())


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    place = tmp_path_factory.mktemp("faults")
    site = faulty(place, write_random_model(place / "model", MODEL))
    yield site
    print("\n| rank | phase | fault | noticed after | serves again after |\n|---|---|---|---|---|")
    print("\n".join(site.table))
    site.server.stop()


class Whole(threading.Thread):
    """A non-streaming request in a thread of its own."""

    def __init__(self, server: Server, body: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self.answer: httpx.Response
        self._server, self._body = server, body
        self.start()

    def run(self) -> None:
        self.answer = self._server.post("/v1/completions", self._body)

    def text(self) -> str:
        self.join(PATIENCE_S)
        assert self.answer.status_code == 200, self.answer.text
        text: str = self.answer.json()["choices"][0]["text"]
        return text


def strike(site: Site, rank: int, phase: str, action: str) -> tuple[list[Stream], list[Whole]]:
    """Trigger the fault while some requests run and others wait. Returns the streams that run and the requests that
    wait."""
    server = site.server
    if phase == "idle":
        arm(site.faults, rank, phase, action)
        begun: list[Stream] = []
        waiting: list[Whole] = []
    else:
        rows = 1 if phase == "prefill" else 2  # 2 is max_rows: a further request waits
        begun = [Stream(server, LONG) for _ in range(rows)]
        eventually(lambda: all(stream.flowing() for stream in begun))
        if phase == "prefill":
            arm(site.faults, rank, phase, action)
        waiting = [Whole(server, SHORT)]
        if phase != "prefill":
            eventually(lambda: server.load()["waiting"] == 1)
            arm(site.faults, rank, phase, action)
    eventually(lambda: fired(site.faults) is not None)
    return begun, waiting


def mended(site: Site, rank: int, phase: str, action: str, why: str) -> None:
    """Trigger one fault and check its whole course, from the first error until nothing of it is left."""
    server = site.server
    before = site.server.everyone()
    restarts, retried, rounds = (server.metric(f"magicdec_{name}_total") for name in COUNTERS)
    begun, waiting = strike(site, rank, phase, action)
    at = fired(site.faults)
    assert at is not None
    while (health := server.get("/health")).status_code == 200:
        time.sleep(0.05)
    noticed = time.monotonic() - at
    assert (health.status_code, health.json()["error"]["code"]) == (503, "engine_restarting")
    assert re.search(why, health.json()["error"]["message"])
    assert server.get("/ready").status_code == 503
    refused = server.post("/v1/completions", SHORT)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_restarting")
    assert "retry-after" in refused.headers
    while server.get("/ready").status_code != 200:
        time.sleep(0.05)
    site.table.append(f"| {rank} | {phase} | {action} | {noticed:.1f} s | {time.monotonic() - at:.1f} s |")
    for stream in begun:
        stream.join(PATIENCE_S)
        assert stream.done
        assert stream.events[-1]["error"]["code"] == "engine_restarting"
        assert re.search(why, stream.events[-1]["error"]["message"])
    assert [one.text() for one in waiting] == [site.short] * len(waiting)
    assert server.post("/v1/completions", SHORT).json()["choices"][0]["text"] == site.short
    assert site.server.metric("magicdec_engine_restarts_total") == restarts + 1
    assert site.server.metric("magicdec_requests_retried_total") == retried + len(waiting)
    assert site.server.metric("magicdec_rounds_total") > rounds
    nothing_is_left(site)
    _, alive = psutil.wait_procs(before, PATIENCE_S)
    assert alive == []
    server.family = site.server.everyone()


def survived(site: Site, rank: int, phase: str) -> None:
    """Let one rank run out of memory: the batch fails, and the same engine goes on."""
    server = site.server
    before = server.everyone()
    counts = [server.metric(f"magicdec_{name}_total") for name in ("engine_restarts", "requests_retried")]
    begun, waiting = strike(site, rank, phase, "memory")
    for stream in begun:
        stream.join(PATIENCE_S)
        assert stream.done
        assert stream.events[-1]["error"]["code"] == "out_of_memory"
        assert "out of memory in a batch of 2 requests" in stream.events[-1]["error"]["message"]
    if phase == "prefill":
        (refused,) = waiting
        refused.join(PATIENCE_S)
        assert (refused.answer.status_code, refused.answer.json()["error"]["code"]) == (503, "out_of_memory")
        assert "retry-after" in refused.answer.headers
    at = fired(site.faults)
    assert at is not None
    noticed = time.monotonic() - at
    if phase != "prefill":
        assert [one.text() for one in waiting] == [site.short]
    assert Whole(server, SHORT).text() == site.short
    site.table.append(f"| {rank} | {phase} | out of memory | {noticed:.1f} s | goes on |")
    assert server.get("/health").status_code == 200
    assert [server.metric(f"magicdec_{name}_total") for name in ("engine_restarts", "requests_retried")] == counts
    assert server.everyone() == before
    nothing_is_left(site)


def nothing_is_left(site: Site) -> None:
    server = site.server
    eventually(lambda: server.idle() and server.files() == site.files)
    assert len(server.everyone()) == len(server.family)
    assert len(list(server.tmp.iterdir())) == 1
    assert [path.name for path in site.faults.iterdir()] == ["fired"]


_PAIRS = {("idle", "SIGKILL"), ("prefill", "SIGSTOP"), ("draft", "exception")}
"""Every action, and every phase but verify, in which rank 0 is killed."""


@pytest.mark.parametrize(
    ("phase", "action"),
    [
        (phase, action) if (phase, action) in _PAIRS else only_in_all(phase, action)
        for phase in ("idle", "prefill", "draft", "verify")
        for action in ("SIGKILL", "SIGSTOP", "exception")
    ],
)
def test_rank_1(site: Site, phase: str, action: str) -> None:
    mended(site, 1, phase, action, RANK_1[action].format("rank 1"))


@pytest.mark.parametrize(
    ("phase", "action"), [("verify", "SIGKILL"), only_in_all("draft", "SIGSTOP"), only_in_all("prefill", "exception")]
)
def test_rank_0(site: Site, phase: str, action: str) -> None:
    mended(site, 0, phase, action, RANK_0[action].format("rank 0"))


@pytest.mark.parametrize(("phase", "rank"), each_value(["prefill", "draft", "verify"], [0, 1]))
def test_a_rank_out_of_memory(site: Site, phase: str, rank: int) -> None:
    survived(site, rank, phase)


@whole_test_only_in_all
def test_a_rank_out_of_memory_that_cannot_call_the_others_back(site: Site, tmp_path: Path) -> None:
    """Over sockets a round cannot be abandoned, so the engine is replaced."""
    sockets = faulty(tmp_path, site.model, collectives="gloo")
    sockets.table = site.table
    try:
        mended(sockets, 1, "verify", "memory", "rank 1 is out of memory: .*can't allocate memory")
    finally:
        sockets.server.stop()


@pytest.mark.parametrize("phase", ["idle", only_in_all("prefill"), "draft", only_in_all("verify")])
def test_sigterm_for_a_rank_changes_nothing(site: Site, phase: str) -> None:
    """Only rank 0 reacts to SIGTERM."""
    restarts, before = site.server.metric("magicdec_engine_restarts_total"), site.server.everyone()
    arm(site.faults, 1, phase, "SIGTERM")
    if phase != "idle":
        assert Whole(site.server, SHORT).text() == site.short
    eventually(lambda: fired(site.faults) is not None)
    assert Whole(site.server, SHORT).text() == site.short
    assert site.server.get("/health").status_code == 200
    assert site.server.metric("magicdec_engine_restarts_total") == restarts
    assert site.server.everyone() == before
    nothing_is_left(site)


@pytest.fixture(scope="module")
def alone(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Server with a single rank."""
    alone = faulty(tmp_path_factory.mktemp("alone"), site.model, "--tensor-parallel-size", "1")
    assert alone.short == site.short
    yield alone
    alone.server.stop()


@pytest.mark.parametrize("phase", [only_in_all("prefill"), only_in_all("draft"), "verify"])
def test_the_only_rank_out_of_memory(alone: Site, phase: str) -> None:
    survived(alone, 0, phase)


def test_a_signal_while_a_request_waits_for_an_engine(alone: Site) -> None:
    """Last test of this server. Draining serves the waiting request first, and that needs a new engine."""
    arm(alone.faults, 0, "prefill", "SIGKILL")
    waiting = Whole(alone.server, SHORT)
    eventually(lambda: alone.server.get("/health").status_code == 503)
    alone.server.signal(signal.SIGTERM)
    eventually(lambda: "draining" in alone.server.log.read_text())  # /ready reports the restart until it is over
    assert waiting.text() == alone.short
    assert alone.server.wait() == 0


def test_a_signal_while_there_is_no_engine(site: Site) -> None:
    """Last test of this server. It shuts down cleanly in the middle of an engine start."""
    arm(site.faults, 1, "idle", "SIGKILL")
    eventually(lambda: site.server.get("/health").status_code == 503)
    site.server.family = site.server.everyone()
    site.server.signal(signal.SIGTERM)
    assert site.server.wait() == 0
