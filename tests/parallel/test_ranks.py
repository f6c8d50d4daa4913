"""Ranks as processes: the same text as one rank, and exactly one clear error when one of them is gone."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from engine.batch.runner import Runner
from engine.config.deployment import ConfigError, EngineConfig
from engine.core import Engine
from engine.llm import LLM
from engine.messages import AddRequest
from engine.params import SamplingParams
from engine.ranks.executor import RankExecutor
from models.batch import ForwardBatch
from parallel import rendezvous
from parallel.group import RankFailure
from tests.support.engines import run, tokens
from tests.support.paths import ROOT
from tests.support.profiles import is_all, only_in_all, whole_test_only_in_all
from tests.support.ranks import PROCESS_MODEL, settings, write_random_model


@pytest.fixture(scope="module")
def random_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("models") / "random", PROCESS_MODEL)


def up_to(size: int) -> int:
    """Number of ranks for a fault that one rank besides rank 0 can show: each is a process that takes long to start."""
    return size if is_all() else 2


def held() -> dict[str, set[str]]:
    """Child processes, open files and temporary files of this process."""
    gc.collect()
    files = set()
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the descriptor of the listing itself is closed by now
            files.add(f"{fd.name} {fd.readlink()}")
    return {
        "processes": {str(child) for child in psutil.Process().children(recursive=True)},
        "files": files,
        "names": {
            str(path) for place in (tempfile.gettempdir(), "/dev/shm") for path in Path(place).glob("*magicdec*")
        },
    }


@pytest.fixture(scope="module", autouse=True)
def own_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A folder for temporary files that no other test uses meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("own"))
        patch.setenv("TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", folder)
        yield


@pytest.fixture(scope="module", autouse=True)
def store_library(own_folder: None) -> None:
    """Open a store first: the first one of a process opens a pipe that the library never closes."""
    rendezvous.host_store(1, timeout_s=1)


@pytest.fixture(autouse=True)
def nothing_remains() -> Iterator[None]:
    """No process, file descriptor or temporary file outlives an engine."""
    before = held()
    yield
    after = held()
    assert {kind: after[kind] - before[kind] for kind in after} == {kind: set() for kind in after}


def start(random_dir: Path, size: int, gamma: int = 2, **others: Any) -> Engine:
    chosen = settings(gamma, model=str(random_dir), dtype="float64", tensor_parallel_size=size, max_model_len=None)
    config = EngineConfig.model_validate(chosen | others)
    return Engine(config, progress=False)


def requests() -> list[AddRequest]:
    """Greedy, sampled, truncated and penalised requests, also with log-probabilities; prompts of 1 to 100 tokens."""
    ways: list[dict[str, Any]] = [
        {"temperature": 0.0, "logprobs": 2},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_k": 7, "top_p": 0.9},
        {"temperature": 1.2, "top_p": 0.7, "repetition_penalty": 1.2},
    ]
    return [
        AddRequest(str(i), [3 + j % 300 for j in range(1 + 33 * i)], SamplingParams(max_tokens=20, seed=i, **way))
        for i, way in enumerate(ways)
    ]


def pids(engine: Engine) -> dict[int, int]:
    assert engine._ranks
    assert engine._ranks._processes
    return engine._ranks._processes.pids


def drafts_of_a_model(directory: Path, count: int) -> dict[str, Any]:
    """Write a draft model. Returns settings of speculation by it on the first `count` ranks."""
    config = replace(PROCESS_MODEL, num_layers=1, num_heads=6, num_kv_heads=2)
    draft = write_random_model(directory / "draft", config, seed=1)
    speculation = {"gamma": 2, "drafter": "model", "model": str(draft), "tensor_parallel_size": count}
    return speculation | {"kv": {"budget": 16, "sink": 4}}


def test_processes_never_change_output(random_dir: Path, tmp_path: Path) -> None:
    """Over both transports, and with two engines at the same time; in `make test` one of them has a draft model on its
    first rank."""
    plain = start(random_dir, 1, gamma=0)
    expected = run(plain, requests())
    plain.close()
    drafts: dict[str, Any] = {} if is_all() else {"speculation": drafts_of_a_model(tmp_path, 1)}
    engines = [start(random_dir, up_to(3), digest_every=4, **drafts), start(random_dir, 2, collectives="gloo")]
    try:
        for engine in engines:
            outputs = run(engine, requests())
            assert engine.stats().accepted_tokens > 0
            for request in requests():
                assert tokens(outputs[request.id]) == tokens(expected[request.id])
    finally:
        for engine in engines:
            engine.close()


@whole_test_only_in_all
@pytest.mark.parametrize("collectives", ["shared", "gloo"])
def test_a_draft_model_on_the_first_ranks(random_dir: Path, tmp_path: Path, collectives: str) -> None:
    plain = start(random_dir, 1, gamma=0)
    expected = run(plain, requests())
    plain.close()
    speculation = drafts_of_a_model(tmp_path, 2)
    engine = start(random_dir, 3, collectives=collectives, digest_every=4, speculation=speculation)
    try:
        outputs = run(engine, requests())
        assert engine.stats().accepted_tokens > 0
    finally:
        engine.close()
    assert {id: tokens(found) for id, found in outputs.items()} == {id: tokens(found) for id, found in expected.items()}


@whole_test_only_in_all
def test_default_model(model_dir: Path) -> None:
    """The default model in float32 over 1, 2 and 3 ranks, with speculation and without: 9 query heads, 3 KV heads, and
    real text instead of noise."""
    prompts = ["The capital of France is", "def fibonacci(n):\n"]
    params = [SamplingParams(max_tokens=12), SamplingParams(max_tokens=12, temperature=0.8, top_p=0.95, seed=3)]
    texts = []
    for size, gamma in ((1, 0), (2, 3), (3, 3)):
        chosen = settings(gamma, model=str(model_dir), dtype="float32", tensor_parallel_size=size)
        with LLM(EngineConfig.model_validate(chosen | {"scheduler": {}, "max_model_len": 512})) as llm:
            texts.append([completion.token_ids for completion in llm.generate(prompts, params)])
    assert all(other == texts[0] for other in texts[1:])


# -- faults ------------------------------------------------------------------------------------------------------------


def busy(engine: Engine) -> None:
    """Run the engine with one long request until it fails or ends."""
    engine.add(AddRequest("busy", [5, 6, 7], SamplingParams(max_tokens=2000, ignore_eos=True)))
    while engine.has_work():
        engine.step()


def noticed(engine: Engine) -> None:
    """Check the ranks as an idle engine does, repeatedly: a process can be dead a moment before its sockets close."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        engine.check_ranks()
        time.sleep(0.01)


def fails(engine: Engine, named: str, *, idle: bool = False) -> None:
    """Check that the engine fails with one error, raises the same error on the next call, and leaves nothing behind."""
    try:
        with pytest.raises(RankFailure, match=named):
            noticed(engine) if idle else busy(engine)
        with pytest.raises(RankFailure, match=named):
            engine.check_ranks()
        remaining = pids(engine).values()
    finally:
        engine.close()
    assert not any(psutil.pid_exists(pid) for pid in remaining)


@pytest.mark.parametrize("collectives", [only_in_all("shared"), "gloo"])
def test_killed_at_work(random_dir: Path, collectives: str) -> None:
    size = up_to(3)
    engine = start(random_dir, size, collectives=collectives)
    timer = threading.Timer(0.3, os.kill, (pids(engine)[size - 1], signal.SIGKILL))
    timer.start()
    fails(engine, rf"rank {size - 1} was killed by signal 9 \(SIGKILL\)")
    timer.join()


@whole_test_only_in_all
def test_killed_while_idle(random_dir: Path) -> None:
    engine = start(random_dir, 2)
    engine.check_ranks()
    os.kill(pids(engine)[1], signal.SIGKILL)
    while psutil.Process(pids(engine)[1]).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    fails(engine, "rank 1 was killed by signal 9", idle=True)


@pytest.mark.parametrize("collectives", ["shared", only_in_all("gloo")])
def test_stopped(random_dir: Path, collectives: str) -> None:
    size = up_to(3)
    engine = start(random_dir, size, collectives=collectives, step_timeout_s=1)
    os.kill(pids(engine)[size - 1], signal.SIGSTOP)
    fails(engine, rf"rank {size - 1} did not answer within 1 s \(stopped by a signal\)")


def test_a_group_of_the_first_ranks_notices_too(random_dir: Path) -> None:
    engine = start(random_dir, 3)
    assert engine._ranks
    alone, both = engine._ranks.join_first(1), engine._ranks.join_first(2)
    assert alone
    assert both
    assert (alone.size, both.rank, both.size) == (1, 0, 2)
    os.kill(pids(engine)[1], signal.SIGKILL)
    try:
        with pytest.raises(RankFailure, match="rank 1 was killed by signal 9"):
            both.all_reduce(torch.ones(1))
    finally:
        engine.close()


@whole_test_only_in_all
def test_an_exception(random_dir: Path) -> None:
    engine = start(random_dir, 3)
    assert engine._ranks
    engine._ranks._channel.send(2, b"no plan")
    fails(engine, "rank 2 failed: ValidationError")


def test_only_rank_0_can_be_interrupted(random_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in a terminal sends the signal to every process; only rank 0 decides what follows. Once it is interrupted,
    the other ranks are still inside the round, so the engine must not start another one."""
    engine = start(random_dir, 2)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(pids(engine)[1], number)
    run(engine, requests())

    def interrupt(plan: object, meanwhile: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine._worker, "execute", interrupt)
    with pytest.raises(KeyboardInterrupt):
        busy(engine)
    monkeypatch.undo()
    with pytest.raises(RankFailure, match="cut short by KeyboardInterrupt"):
        engine.step()
    engine.close()


@whole_test_only_in_all
def test_rank_0_out_of_memory_over_gloo(random_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other ranks wait inside the round and cannot be released, so the whole engine fails, not only the batch."""
    engine = start(random_dir, 2, collectives="gloo")

    def starve(runner: Runner, batch: ForwardBatch) -> None:
        torch.empty(1 << 60, dtype=torch.uint8)

    monkeypatch.setattr(Runner, "forward", starve)
    fails(engine, "rank 0 is out of memory: .*can't allocate memory")


def test_killed_while_loading(random_dir: Path) -> None:
    def launch(config: EngineConfig, device: torch.device) -> RankExecutor:
        ranks = RankExecutor.launch(config, device)
        assert ranks._processes
        os.kill(ranks._processes.pids[1], signal.SIGKILL)
        return ranks

    config = EngineConfig.model_validate(settings(0, model=str(random_dir), tensor_parallel_size=2))
    with pytest.raises(RankFailure, match="rank 1 was killed by signal 9"):
        Engine(config, ranks=launch, progress=False)


@pytest.mark.parametrize("failed", [only_in_all(RuntimeError), KeyboardInterrupt])
def test_a_start_that_fails_when_all_ranks_are_ready(
    random_dir: Path, monkeypatch: pytest.MonkeyPatch, failed: type[BaseException]
) -> None:
    others = psutil.Process().children()
    ready: list[psutil.Process] = []

    def profile(*_: object) -> None:
        ready.extend(set(psutil.Process().children()) - set(others))
        raise failed

    monkeypatch.setattr("engine.worker.controllers.load_profile", lambda key: None)
    monkeypatch.setattr("engine.worker.controllers.profile", profile)
    with pytest.raises(failed) as caught:
        start(random_dir, 2, speculation={"gamma": "auto", "kv": {"budget": 16, "sink": 4}})
    assert len(ready) == 1
    assert not ready[0].is_running()  # while the traceback still references the engine
    del caught


def test_never_ready(random_dir: Path) -> None:
    with pytest.raises(RankFailure, match=r"ranks 1, 2 not ready after 0\.01 s"):
        start(random_dir, 3, start_timeout_s=0.01)


@pytest.mark.parametrize(
    ("others", "named"),
    [
        ({"tensor_parallel_size": 10}, "engine.tensor_parallel_size: 9 query heads cannot be split over 10 ranks"),
        ({"collectives": "nccl"}, "engine.collectives: nccl does not support the device cpu"),
    ],
)
def test_settings_that_cannot_be(random_dir: Path, others: dict[str, Any], named: str) -> None:
    config = settings(0, model=str(random_dir), tensor_parallel_size=2) | others
    with pytest.raises(ConfigError, match=named):
        Engine(EngineConfig.model_validate(config), progress=False)


@whole_test_only_in_all
@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
@pytest.mark.parametrize("collectives", ["auto", "symmetric"])
def test_symmetric_memory_that_does_not_work(
    random_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, collectives: str
) -> None:
    """All ranks do without it, unless the settings demand it."""
    monkeypatch.setattr(rendezvous, "choose", lambda device, wanted: "symmetric")
    if collectives == "symmetric":
        with pytest.raises(ConfigError, match=r"^engine\.collectives: no symmetric memory \(rank \d: .* auto or nccl$"):
            start(random_dir, 2, collectives=collectives)
        return
    engine = start(random_dir, 2)
    assert run(engine, requests())
    engine.close()
    assert len([line for line in caplog.messages if "without symmetric memory (rank " in line]) == 1


@contextlib.contextmanager
def rank_0(random_dir: Path, size: int, then: str) -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    """Start a process that starts an engine of `size` ranks and runs the code `then`. Yields it, and the processes of
    the other ranks."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom tests.parallel.test_ranks import busy, pids, start\n"
        f"engine = start(Path(sys.argv[1]), {size})\nprint(*pids(engine).values(), flush=True)\n{then}\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(random_dir)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        others = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]
        assert len(others) == size - 1
        yield process, others


@pytest.mark.parametrize("held", [only_in_all(False), True])
def test_ranks_end_with_rank_0(random_dir: Path, held: bool) -> None:
    """All ranks end even if rank 0 is killed while the other ranks wait for it inside a round, or while one of them is
    suspended."""
    with rank_0(random_dir, up_to(3), "sys.stdin.read()" if held else "busy(engine)") as (process, others):
        if held:
            others[0].suspend()
        process.kill()
    _, alive = psutil.wait_procs(others, timeout=60)
    for left in alive:
        left.kill()
    assert alive == []
