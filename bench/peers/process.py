"""Run one contender as a process, controlled by JSON lines (bench/peers/programs/driver.py), stopped while others are
measured."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any, Self

from bench.machine import CpuQuota
from bench.peers.install import PeerError

PEERS = Path(__file__).parent / "programs"


class PeerProcess:
    """A contender's process. Its process group is stopped between requests, so that spinning threads use no CPU."""

    def __init__(
        self,
        python: Path,
        peer: Path,
        settings: Mapping[str, Any],
        *,
        log: Path,
        timeout_s: float,
        environment: Mapping[str, str] | None = None,
        quota: CpuQuota | None = None,
    ) -> None:
        """Start the process and wait until the model is loaded.

        peer: the contender's file. log: file for its standard error. timeout_s: limit of the start and of each answer.
        environment: variables in addition to those of this process. quota: the group that it enters before anything
        else; it is removed with the process. Raises PeerError.
        """
        self._log, self._timeout_s, self._quota = log, timeout_s, quota
        variables = {"HF_HUB_OFFLINE": "1"}
        if settings["threads"] is not None:
            variables |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(settings["threads"]))
        command = [str(python), "-P", str(PEERS / "driver.py"), str(peer), json.dumps(settings)]
        if quota is not None:
            command = ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', str(quota.entry), *command]
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env={**os.environ, **variables, **(environment or {})},
                start_new_session=True,
            )
        self._unread = b""
        try:
            ready = self._answer()["ready"]
        except BaseException:
            self.close()
            raise
        self.max_batch: int | None = ready["max_batch"]
        self.about: str = ready["about"]
        self._signal(signal.SIGSTOP)

    def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        """Send a request and return its answer. Raises PeerError: an error of the contender, its end, or a timeout."""
        assert self._process.stdin is not None
        line = json.dumps({"op": op, **fields}) + "\n"
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()
        except OSError:
            raise self._gone() from None
        try:
            return self._answer()
        finally:
            self._signal(signal.SIGSTOP)

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def close(self) -> None:
        """Kill the process and its process group, and remove its quota."""
        self._signal(signal.SIGKILL)
        self._process.wait()
        if self._quota is not None:
            self._quota.close()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):  # an unsent line remains
                    stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _signal(self, number: signal.Signals) -> None:
        if self._process.returncode is None:  # after the wait its id can be reused
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def _answer(self) -> dict[str, Any]:
        """Read one answer. Raises PeerError: an error in the answer, the end of the process, or a timeout."""
        assert self._process.stdout is not None
        until = monotonic() + self._timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                if not selector.select(max(0.0, until - monotonic())):
                    self.close()
                    raise PeerError(f"no answer within {self._timeout_s:g} s")
                piece = os.read(self._process.stdout.fileno(), 1 << 20)
                if not piece:
                    raise self._gone()
                self._unread += piece
        line, _, self._unread = self._unread.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def _gone(self) -> PeerError:
        status = self._process.wait()
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        how = signal.Signals(-status).name if status < 0 else f"status {status}"
        return PeerError(f"it ended ({how}){': ' + lines[-1] if lines else ''}")
