"""Check a machine with a GPU in a few minutes: tests of kernels and engines, then one bench point per kind of kernels.

    python -m bench.gpu.check
    python -m bench.gpu.check --steps kernels,engines --seconds 200 --logs DIR

Each step is a process of its own, so that a fault of one leaves the later ones a sound device. A step that fails, or
takes too long and is ended, does not keep the others from running. Prints one table last, and keeps the whole output
of all steps in a folder. The exit status is 0 only if every step passed; FlashInfer's are skipped where it is missing.
Needs the standard library alone, so that the table also tells what else is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from bench.gpu.check_report import Finding, StepOutcome, StepResult, read_bench, read_tests, table

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 480
"""Time for all steps together."""
_GRACE = 5
"""Seconds that an interrupted step has to say where it was, before it is killed."""
_COST = _GRACE + 1
"""Seconds beyond its limit that a step may cost."""
_POLL = 0.1
"""Seconds until an interrupt is noticed."""
_PYTEST = ("-m", "pytest", "-v", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=20", "--durations=10")
_BENCH = ("-m", "bench.gpu", "--shapes", "llama-3.1-8b", "--points", "16x8000", "--rounds", "6")


@dataclass(frozen=True, slots=True)
class Step:
    """One process, Python with `arguments`. seconds: time that it can take in any case; it gets more if earlier steps
    leave some. package: import name of what it needs besides torch and Triton; it is skipped where that is missing.
    results: whether it is a benchmark, which writes its results to a file, and not a run of pytest."""

    name: str
    arguments: tuple[str, ...]
    seconds: float
    package: str | None = None
    results: bool = False

    @property
    def lacks_package(self) -> bool:
        return self.package is not None and importlib.util.find_spec(self.package) is None


def _tests(name: str, file: str, seconds: float, package: str | None = None, *more: str) -> Step:
    return Step(name, (*_PYTEST, *more, f"tests/{file}"), seconds, package)


STEPS = (
    _tests("kernels", "unit/kernels/test_gpu_kernels.py", 80, None, "--hypothesis-profile=gpu"),
    _tests("cuda", "gpu/test_cuda.py", 30),
    _tests("shapes", "gpu/test_gpu_kernels.py", 66),
    _tests("flashinfer", "gpu/test_flashinfer.py", 45, "flashinfer"),
    _tests("shared", "gpu/test_shared_reading.py", 20, "triton"),
    _tests("engines", "gpu/test_engines.py", 68),
    _tests("collectives", "gpu/test_collectives.py", 25),
    Step("bench-triton", (*_BENCH, "--kernels", "triton"), 45, results=True),
    Step("bench-flashinfer", (*_BENCH, "--kernels", "flashinfer"), 45, "flashinfer", results=True),
)
"""In the order of what they show per second. Any time that is left over goes to the steps in the same order."""


@dataclass(slots=True)
class Check:
    """Run of steps one after the other. steps: those to run. seconds: time for all. logs: folder for their output.
    interrupted: whether to end, which a handler of signals may set at any time."""

    steps: Sequence[Step]
    seconds: float
    logs: Path
    results: list[StepResult] = field(default_factory=list)
    interrupted: bool = False

    def run(self) -> bool:
        """Run the steps, or those before an interrupt. Returns whether all passed, apart from those for which a
        package is missing."""
        ends = time.monotonic() + self.seconds
        (self.logs / "table.txt").write_text("no step has ended\n", encoding="utf-8")
        for i, step in enumerate(self.steps):
            if self.interrupted:
                break
            print(f"{i + 1}/{len(self.steps)} {step.name}", file=sys.stderr, flush=True)
            self.results.append(self._result(step, self._limit(i, ends - time.monotonic())))
            (self.logs / "table.txt").write_text(table(self.results) + "\n", encoding="utf-8")
        outcomes = {each.outcome for each in self.results}
        return not self.interrupted and "passed" in outcomes and outcomes <= {"passed", "skipped"}

    def _limit(self, i: int, left: float) -> float:
        """Return the seconds that step i may take, out of those that are left: its own, and what the later ones do not
        need; less than its own if it does not fit. Later steps that would not fit need nothing."""
        step = self.steps[i]
        spare = left - step.seconds - _GRACE
        if spare < 0:
            return left - _GRACE
        for each in self.steps[i + 1 :]:
            cost = each.seconds + _COST
            if cost <= spare and not each.lacks_package:
                spare -= cost
        return step.seconds + spare

    def _result(self, step: Step, limit: float) -> StepResult:
        if step.lacks_package:
            return StepResult(step.name, "skipped", 0, Finding(f"{step.package} is not installed"))
        if limit < step.seconds:
            note = f"needs {step.seconds:.0f} s, and {max(0.0, limit):.0f} s are left"
            return StepResult(step.name, "no time", 0, Finding(note))
        log, file = self.logs / f"{step.name}.log", self.logs / f"{step.name}.json"
        more = ("--json", str(file)) if step.results else ()
        began = time.monotonic()
        status = self._run([sys.executable, *step.arguments, *more], log, limit)
        taken = time.monotonic() - began
        output = log.read_text(encoding="utf-8", errors="replace")
        ended: StepOutcome | None = None
        if status is None:
            ended = "interrupted" if self.interrupted else "too long"
        passed, finding = read_bench(output, status, file) if step.results else read_tests(output, status)
        return StepResult(step.name, ended or ("passed" if passed else "failed"), taken, finding)

    def _run(self, command: Sequence[str], log: Path, limit: float) -> int | None:
        """Run a command in a process group of its own. Returns its exit status; None if it was ended, because of its
        time or because of an interrupt."""
        # CI: pytest reports failures in full. Output reaches the log at once, so that it shows where a step hung.
        environment = {**os.environ, "CI": "true", "PYTHONUNBUFFERED": "1"}
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                ends = time.monotonic() + limit
                while time.monotonic() < ends and not self.interrupted:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        return process.wait(_POLL)
                if not self.interrupted:
                    _signal(process, signal.SIGINT)  # pytest then reports what it has, and where it was
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(_GRACE)
            finally:
                _signal(process, signal.SIGKILL)  # also processes that it has left behind
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_GRACE)  # a process inside a driver that hangs cannot be killed
        return None


def _signal(process: subprocess.Popen[bytes], which: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, which)


def describe_machine() -> str:
    """Return lines about the devices, their driver, versions and the date. Loads neither torch nor the driver."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        devices = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        devices = ""
    versions = [f"Python {sys.version.split()[0]}"]
    for package in ("torch", "triton", "flashinfer-python"):
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            versions.append(f"no {package}")
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return "\n".join([devices or "nvidia-smi names no device", ", ".join(versions), date])


def run(steps: Sequence[Step], seconds: float, logs: Path) -> int:
    """Run steps, and print the table. Returns the exit status."""
    logs.mkdir(parents=True, exist_ok=True)
    machine = describe_machine()
    (logs / "machine.txt").write_text(machine + "\n", encoding="utf-8")
    check = Check(steps, seconds, logs)

    def interrupt(number: int, frame: object) -> None:
        check.interrupted = True

    previous = {each: signal.signal(each, interrupt) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        good = check.run()
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)
    results = [asdict(result) for result in check.results]
    (logs / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"{machine}\nwhole output: {logs}\n\n{table(check.results)}", flush=True)
    return 130 if check.interrupted else 0 if good else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [step.name for step in STEPS]
    parser.add_argument("--steps", help=f"comma-separated, in the order given: any of {', '.join(names)}")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"time for all steps ({SECONDS})")
    parser.add_argument("--logs", type=Path, help="folder for the output (build/gpu-check/ and the time)")
    arguments = parser.parse_args()
    wanted = names if arguments.steps is None else arguments.steps.split(",")
    if unknown := [name for name in wanted if name not in names]:
        parser.error(f"--steps: {unknown[0]!r} is not one of {', '.join(names)}")
    if not (ROOT / "tests").is_dir():
        parser.error(f"{ROOT} is not a checkout: it has no tests")
    logs = arguments.logs or ROOT / "build" / "gpu-check" / datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    steps = [STEPS[names.index(name)] for name in wanted]
    return run(steps, arguments.seconds, logs.resolve())


if __name__ == "__main__":
    sys.exit(main())
