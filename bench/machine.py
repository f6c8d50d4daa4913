"""Conditions of a measurement: the processor, processes that keep cores busy, and CPU quotas."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from bench.corpus import BenchError
from kernels.cpu.compiler import processor_name, supported
from kernels.cpu.cpus import cpu_groups

_FEATURES = {
    "amx": "AMX",
    "avx512_bf16": "AVX-512 with bfloat16",
    "avx512": "AVX-512",
    "avx_vnni": "AVX2 with VNNI",
    "avx2": "AVX2",
    "neon_bf16": "NEON with bfloat16",
    "neon_dotprod": "NEON",
}
"""Names of instruction sets in reports."""
_PERIOD_US = 100_000
"""Period of a quota: the kernel's default."""


def describe_processor() -> str:
    """Return the processor's model name and its best instruction set, as far as they are known."""
    return ", ".join(part for part in (processor_name(), _FEATURES.get(supported()[0].name)) if part)


def first_cores(count: int) -> list[int]:
    """Return the first `count` CPUs of the affinity mask. Raises BenchError if there are fewer."""
    cores = sorted(os.sched_getaffinity(0))
    if count > len(cores):
        raise BenchError(f"{count} busy processes, but there are {len(cores)} CPUs")
    return cores[:count]


@contextlib.contextmanager
def busy(cores: Iterable[int | None]) -> Iterator[None]:
    """Run one process per item that computes all the time, pinned to that CPU; None: wherever the system places it."""
    command = [sys.executable, "-S", "-c", "print(flush=True)\nwhile True: pass"]
    with contextlib.ExitStack() as stack:
        for core in cores:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
            stack.callback(_end, process)
            assert process.stdout is not None
            process.stdout.readline()  # from here on it computes
            if core is not None:
                os.sched_setaffinity(process.pid, {core})
        yield


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


class CpuQuota:
    """A control group with a CPU quota, for the processes that enter it. It is removed on exit; they must have ended
    by then."""

    def __init__(self, cpus: float, proc: Path = Path("/proc/self"), groups: Path = Path("/sys/fs/cgroup")) -> None:
        """Create the group below this process's own, or the nearest one above that permits it.

        proc, groups: where Linux keeps a process's groups, and all groups. Raises BenchError if none permits it.
        """
        reasons: list[str] = []
        for parent in cpu_groups(proc, groups):
            if not (parent / "cgroup.procs").exists():
                continue
            self._group = parent / f"magicdec-{os.getpid()}-{id(self):x}"
            try:
                self._group.mkdir()
            except OSError as error:
                reasons.append(f"{parent}: {error.strerror}")
                continue
            try:
                self._limit(int(cpus * _PERIOD_US))
                return
            except OSError as error:
                reasons.append(f"{error.filename}: {error.strerror}")
                self.close()
        why = reasons[0] if reasons else "no control group has the CPU controller"
        raise BenchError(f"a CPU quota is not permitted here ({why})")

    @property
    def entry(self) -> Path:
        """File that a process writes its id to (or 0, for itself) to enter the group."""
        return self._group / "cgroup.procs"

    def close(self) -> None:
        """Remove the group. One that still has processes after a second stays."""
        until = time.monotonic() + 1
        while self._group.exists():
            try:
                self._group.rmdir()
            except OSError:  # killed processes that have not ended yet
                if time.monotonic() > until:
                    return
                time.sleep(0.01)

    def __enter__(self) -> CpuQuota:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _limit(self, quota_us: int) -> None:
        if (self._group / "cpu.cfs_quota_us").exists():
            _write(self._group / "cpu.cfs_period_us", f"{_PERIOD_US}")
            _write(self._group / "cpu.cfs_quota_us", f"{quota_us}")
        else:
            _write(self._group / "cpu.max", f"{quota_us} {_PERIOD_US}")


def _write(file: Path, text: str) -> None:
    """Write to a file that exists: a control group has no others."""
    with file.open("r+", encoding="ascii") as opened:
        opened.write(text)
