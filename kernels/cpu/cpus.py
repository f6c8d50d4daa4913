"""Number of cores that this process may use: by its affinity mask and the CPU quotas of its control groups."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path


def usable_cores(proc: Path = Path("/proc/self"), system: Path = Path("/sys")) -> int:
    """Count the cores that threads of this process can keep busy, at least one. Two hyperthreads are one core.

    A quota of 1.5 CPUs counts as two: its threads are stopped for a quarter of the time, all at once. proc, system:
    where Linux keeps what it says of this process, and of processors and control groups.
    """
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    siblings = (system / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list" for cpu in cpus)
    cores = len({_read(file) or file for file in siblings})
    quotas = (quota for group in cpu_groups(proc, system / "fs/cgroup") for quota in _quota(group))
    return max(1, min(cores, math.ceil(min(quotas, default=cores))))


def cpu_groups(proc: Path, groups: Path) -> Iterator[Path]:
    """Yield the folders where the process's control groups with the CPU controller may be, and those above them, each
    from the inside out. Not all of them exist."""
    for line in _read(proc / "cgroup").splitlines():
        fields = line.split(":", 2)
        if len(fields) < 3:
            continue
        _, controllers, path = fields
        if not controllers:  # version 2: one tree, beside which version 1 may have the controller
            roots = [groups, groups / "unified"]
        elif "cpu" in controllers.split(","):
            roots = [groups / controllers, groups / "cpu"]
        else:
            continue
        # In a container the path may be the host's, while its files are those of the root.
        inner = Path(path.lstrip("/"))
        for root in roots:
            yield from (root / group for group in (inner, *inner.parents))


def _quota(group: Path) -> Iterator[float]:
    """Yield the quota of a control group, in CPUs, if it has one."""
    maximum = _read(group / "cpu.max").split()
    quota, period = (
        maximum if len(maximum) == 2 else (_read(group / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    )
    try:
        if int(quota) > 0 and int(period) > 0:
            yield int(quota) / int(period)
    except ValueError:  # "max", or no such files
        return


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="surrogateescape")  # names of groups may be any bytes
    except (OSError, ValueError):
        return ""
