"""Run `magicdec` with ranks that fail on demand, each at a precise point of a round.

    python -m tests.support.faulty magicdec DIRECTORY ARGUMENTS...

ARGUMENTS are those of `magicdec`. The ranks look for armed faults in DIRECTORY: see `arm`.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import time
from pathlib import Path

from engine.processes.loading_code import without_collecting

PHASES = ("idle", "prefill", "draft", "verify")
ACTIONS = ("SIGKILL", "SIGSTOP", "exception", "SIGTERM", "memory")
_FIRED = "fired"
_LONGEST_VERIFY = 4
"""A target pass with more new tokens than this in one row counts as prefill."""


def command(directory: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "tests.support.faulty", "magicdec", str(directory), *arguments]


def arm(directory: Path, rank: int, phase: str, action: str) -> None:
    """Make this rank perform `action` on itself, once, when it next reaches `phase`."""
    assert phase in PHASES
    assert action in ACTIONS
    (directory / _FIRED).unlink(missing_ok=True)
    draft = directory / "draft"
    draft.write_text(action, encoding="ascii")
    draft.rename(directory / f"{rank}.{phase}")


def fired(directory: Path) -> float | None:
    """Return time.monotonic() of the armed fault, or None if it has not happened."""
    try:
        return float((directory / _FIRED).read_text(encoding="ascii"))
    except (FileNotFoundError, ValueError):
        return None


class _Faults:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.rank = 0

    def at(self, phase: str) -> None:
        armed = self.directory / f"{self.rank}.{phase}"
        try:
            action = armed.read_text(encoding="ascii")
            armed.unlink()
        except FileNotFoundError:
            return
        (self.directory / _FIRED).write_text(str(time.monotonic()), encoding="ascii")
        if action == "exception":
            raise RuntimeError("a fault on purpose")
        if action == "memory":
            import torch

            torch.empty(1 << 60, dtype=torch.uint8)
        os.kill(os.getpid(), signal.Signals[action])


def _insert(faults: _Faults) -> None:
    """Patch this process to check for an armed fault at every phase."""
    import torch

    from engine.batch.runner import Runner
    from engine.batch.view import DenseView
    from engine.ranks import executor, protocol
    from engine.worker.worker import Worker
    from models.batch import ForwardBatch
    from parallel.channel import Link

    init, forward, ping, send_report = Worker.__init__, Runner.forward, executor.RankExecutor.ping, protocol.send_report

    @functools.wraps(init)
    def known(worker: Worker, *arguments: object, **others: object) -> None:
        init(worker, *arguments, **others)  # type: ignore[arg-type]
        faults.rank = worker._group.rank

    def faulty_forward(runner: Runner, batch: ForwardBatch) -> torch.Tensor:
        if not isinstance(runner.view, DenseView):
            faults.at("draft")
        else:
            faults.at("prefill" if max(batch.attention.query_lengths) > _LONGEST_VERIFY else "verify")
        return forward(runner, batch)

    def faulty_ping(mine: executor.RankExecutor) -> float:
        faults.at("idle")
        return ping(mine)

    def faulty_answer(link: Link, report: protocol.RankReport) -> None:
        faults.at("idle")
        send_report(link, report)

    Worker.__init__ = known  # type: ignore[method-assign, assignment]
    Runner.forward = faulty_forward  # type: ignore[method-assign, assignment]
    executor.RankExecutor.ping = faulty_ping  # type: ignore[method-assign, assignment]
    protocol.send_report = faulty_answer


def _magicdec(directory: str, arguments: list[str]) -> None:
    from server import cli, lifecycle

    engine = (sys.executable, "-m", "tests.support.faulty", "engine", directory)
    lifecycle.Lifecycle = functools.partial(lifecycle.Lifecycle, engine_command=engine)  # type: ignore[assignment, misc]
    sys.argv = ["magicdec", *arguments]
    cli.main()


def _engine(directory: str) -> int:
    with without_collecting():
        from engine.processes import engine_server
        from engine.ranks import executor

    executor.RANK_COMMAND = (sys.executable, "-m", "tests.support.faulty", "rank", directory)  # type: ignore[assignment]
    _insert(_Faults(Path(directory)))
    return engine_server._start()


def _rank(directory: str) -> int:
    with without_collecting():
        from engine.processes import rank

    _insert(_Faults(Path(directory)))
    return rank.main()


def main() -> None:
    what, directory, *arguments = sys.argv[1:]
    if what == "magicdec":
        _magicdec(directory, arguments)
    elif what == "engine":
        sys.exit(_engine(directory))
    else:
        status = _rank(directory)
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
