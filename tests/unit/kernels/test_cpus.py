"""Number of cores that a process may use, from made-up folders of Linux; and how torch's threads wait."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.cpu.cpus import usable_cores
from tests.support.paths import ROOT
from tests.support.profiles import is_all


class Machine:
    """Folders that say what Linux says of a process, processors and control groups."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._proc, self._system, self._monkeypatch = folder / "proc", folder / "sys", monkeypatch
        self._proc.mkdir()
        self.groups = self._system / "fs/cgroup"
        self.may_use(range(8))

    def may_use(self, cpus: range | set[int]) -> None:
        self._monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(cpus), raising=False)

    def siblings(self, lists: dict[int, str]) -> None:
        for cpu, siblings in lists.items():
            self._write(self._system / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", siblings)

    def is_in(self, *lines: str | bytes) -> None:
        encoded = [line if isinstance(line, bytes) else line.encode() for line in lines]
        (self._proc / "cgroup").write_bytes(b"".join(line + b"\n" for line in encoded))

    def quota(self, group: str, maximum: str) -> None:
        """Set a quota of version 2."""
        self._write(self.groups / group / "cpu.max", maximum)

    def old_quota(self, group: str, quota: str, period: str = "100000") -> None:
        """Set a quota of version 1."""
        self._write(self.groups / group / "cpu.cfs_quota_us", quota)
        self._write(self.groups / group / "cpu.cfs_period_us", period)

    def cores(self) -> int:
        return usable_cores(self._proc, self._system)

    def _write(self, file: Path, text: str) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def test_this_machine() -> None:
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)


def test_a_system_that_says_nothing(machine: Machine) -> None:
    assert machine.cores() == 8
    machine.may_use({5})
    assert machine.cores() == 1


def test_without_affinity_masks(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert machine.cores() == 3
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert machine.cores() == 1


def test_hyperthreads_of_one_core(machine: Machine) -> None:
    machine.siblings({cpu: f"{cpu % 4},{cpu % 4 + 4}" for cpu in range(8)})
    assert machine.cores() == 4
    machine.may_use({0, 1, 4})
    assert machine.cores() == 2
    machine.may_use({6})
    assert machine.cores() == 1
    machine.may_use(range(10))  # two that nothing is known of
    assert machine.cores() == 6


@pytest.mark.parametrize(
    ("maximum", "cores"),
    [
        ("max 100000", 8),
        ("200000 100000", 2),
        ("150000 100000", 2),
        ("100001 100000", 2),
        ("100000 100000", 1),
        ("1000 100000", 1),
        ("50000 10000", 5),
        ("6400000 100000", 8),
    ],
)
def test_quotas(machine: Machine, maximum: str, cores: int) -> None:
    machine.is_in("0::/user.slice/app")
    machine.quota("user.slice/app", maximum)
    assert machine.cores() == cores


def test_groups_above_count_too(machine: Machine) -> None:
    machine.is_in("0::/a/b/c")
    machine.quota("a/b/c", "600000 100000")
    assert machine.cores() == 6
    machine.quota("a/b", "max 100000")
    assert machine.cores() == 6
    machine.quota("a", "300000 100000")
    assert machine.cores() == 3
    machine.quota("a/b/c", "200000 100000")
    assert machine.cores() == 2
    machine.quota("a/other", "100000 100000")
    assert machine.cores() == 2


@pytest.mark.parametrize("path", ["/", "/docker/0123", "/../../system.slice/x (deleted)"])
def test_a_container_whose_path_is_of_the_host(machine: Machine, path: str) -> None:
    machine.is_in(f"0::{path}")
    machine.quota("", "250000 100000")
    assert machine.cores() == 3


@pytest.mark.parametrize("folder", ["cpu,cpuacct", "cpu"])
@pytest.mark.parametrize("group", ["docker/0123", ""])
def test_version_1(machine: Machine, folder: str, group: str) -> None:
    machine.is_in("5:memory:/docker/0123", "4:cpu,cpuacct:/docker/0123", "3:cpuset:/docker/0123", "1:name=systemd:/x")
    machine.old_quota("memory/docker/0123", "100000")  # of another controller
    assert machine.cores() == 8
    machine.old_quota(f"{folder}/{group}", "-1")
    assert machine.cores() == 8
    machine.old_quota(f"{folder}/{group}", "350000")
    assert machine.cores() == 4
    machine.old_quota(f"{folder}/{group}", "20000", "10000")
    assert machine.cores() == 2


def test_both_versions(machine: Machine) -> None:
    machine.is_in("4:cpu,cpuacct:/a/b", "0::/a/b")
    machine.old_quota("cpu,cpuacct/a", "500000")
    assert machine.cores() == 5
    machine.quota("unified/a/b", "300000 100000")
    assert machine.cores() == 3


def test_a_group_with_a_name_of_any_bytes(machine: Machine) -> None:
    name = b"caf\xc3\xa9-\xff:x"
    machine.is_in(b"0::/" + name)
    machine.quota(os.fsdecode(name), "100000 100000")
    assert machine.cores() == 1


@pytest.mark.parametrize(
    "maximum",
    ["", "max", "100000", "a b", "1 2 3", "-1 100000", "100000 0", "inf 100000", "nan 1", "1e9 -5", "\x00 \x01"],
)
@pytest.mark.parametrize("line", ["0::/a", "", "0", "x:y", "0::", "::::", "0::/a\x00b/c"])
def test_garbage(machine: Machine, line: str, maximum: str) -> None:
    machine.is_in(line)
    for group in ("", "a"):
        machine.quota(group, maximum)
    assert machine.cores() == 8


@pytest.mark.parametrize(
    ("package", "own"), [("engine", None), ("bench", None), ("magicdec", None), ("engine", "ACTIVE")]
)
def test_threads_of_torch_sleep_while_they_wait(package: str, own: str | None) -> None:
    """The setting is there before torch is loaded, which reads it once; `make test` does not load it."""
    script = f"""
import os, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch" and not hasattr(self, "policy"):
            self.policy = os.environ.get("OMP_WAIT_POLICY")
            if {not is_all()}:
                print(self.policy, self.policy, flush=True)
                os._exit(0)

watch = Watch()
sys.meta_path.insert(0, watch)
import {package}
import torch
print(watch.policy, os.environ["OMP_WAIT_POLICY"])
"""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {} if own is None else {"OMP_WAIT_POLICY": own}
    ran = subprocess.run([sys.executable, "-c", script], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert ran.stdout.split() == [own or "PASSIVE"] * 2, ran.stderr
