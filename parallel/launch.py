"""Start the other ranks as processes of this machine, and clean up after them."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from parallel.channel import Link

_STDERR = 2
_GRACE_S = 2.0
"""Time for ranks to exit by themselves before they are killed."""


class RankProcesses:
    """Processes for ranks 1 … size - 1, each with one end of a socket as its standard input.

    A process exits when that socket is closed, so none outlives the process that owns this object, however the owner
    ends.
    """

    def __init__(self, command: Sequence[str], size: int, *, send_timeout_s: float, fds: Sequence[int] = ()) -> None:
        """fds: file descriptors that the processes inherit. Their stdout goes to this process's stderr."""
        self.links: dict[int, Link] = {}
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        try:
            for rank in range(1, size):
                ours, theirs = socket.socketpair()
                self.links[rank] = Link(ours, send_timeout_s)
                with theirs:
                    self._processes[rank] = subprocess.Popen(
                        command,
                        stdin=theirs.fileno(),
                        stdout=_STDERR,
                        pass_fds=fds,
                        # A group of its own: if the owner dies while a signal has stopped this process, the group is
                        # orphaned, and the system ends stopped orphaned groups.
                        process_group=0,
                    )
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> dict[int, int]:
        """Process ids, by rank."""
        return {rank: process.pid for rank, process in self._processes.items()}

    def exit_description(self, rank: int, wait_s: float = 0.0) -> str | None:
        """Describe how a rank ended, e.g. `was killed by signal 9 (SIGKILL)`; None if it still runs after wait_s."""
        process = self._processes[rank]
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(wait_s)
        status = process.returncode
        if status is None:
            return None
        if status >= 0:
            return f"ended with status {status}"
        try:
            return f"was killed by signal {-status} ({signal.Signals(-status).name})"
        except ValueError:
            return f"was killed by signal {-status}"

    def is_stopped(self, rank: int) -> bool:
        """Whether a signal such as SIGSTOP has stopped the rank. False if the system does not report it."""
        try:
            stat = Path(f"/proc/{self._processes[rank].pid}/stat").read_text(encoding="ascii", errors="replace")
        except OSError:
            return False
        return stat.rpartition(")")[2].split()[0] in ("T", "t")

    def close(self) -> None:
        """Close all links and wait until the processes are gone. Those that are stopped or do not exit are killed."""
        for link in self.links.values():
            link.close()
        deadline = time.monotonic() + _GRACE_S
        for rank, process in self._processes.items():
            if self.is_stopped(rank):
                process.kill()
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
        for process in self._processes.values():
            process.wait()
