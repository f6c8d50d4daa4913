"""Busy processes, CPU quotas and the processor's description."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from bench.corpus import BenchError
from bench.machine import _FEATURES, CpuQuota, busy, describe_processor, first_cores
from kernels.cpu.compiler import instruction_sets


def cpu_seconds() -> float:
    """Return the CPU time of ended child processes."""
    times = os.times()
    return times.children_user + times.children_system


def test_busy_processes_compute_until_the_end() -> None:
    before = cpu_seconds()
    with busy([first_cores(1)[0], None]):
        time.sleep(0.5)
    assert cpu_seconds() - before > 0.1  # even beside other load


def test_more_busy_processes_than_cores() -> None:
    with pytest.raises(BenchError, match="busy processes, but there are"):
        first_cores(len(os.sched_getaffinity(0)) + 1)


def test_the_processor_is_named() -> None:
    assert "\n" not in describe_processor()
    names = {each.name for machine in ("x86_64", "aarch64") for each in instruction_sets(machine)}
    assert set(_FEATURES) == names - {"portable"}


@pytest.mark.parametrize("version", [1, 2])
def test_a_quota_that_is_not_permitted(tmp_path: Path, version: int) -> None:
    """Where groups cannot be limited, the reason is said and nothing remains: folders of a plain file system have no
    files of quotas."""
    (tmp_path / "cgroup").write_text("0::/\n" if version == 2 else "1:cpu:/\n")
    groups = tmp_path / "groups"
    (groups / "cpu").mkdir(parents=True)
    for folder in (groups, groups / "cpu"):
        (folder / "cgroup.procs").touch()
    with pytest.raises(BenchError, match="a CPU quota is not permitted here"):
        CpuQuota(1, proc=tmp_path, groups=groups)
    assert not list(groups.rglob("magicdec-*"))


def test_no_control_groups(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="no control group has the CPU controller"):
        CpuQuota(1, proc=tmp_path, groups=tmp_path)
