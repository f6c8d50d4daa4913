"""Health of the other ranks, tracked on rank 0, and diagnosis of the rank that failed first and its reason."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

import msgspec

from engine.ranks.protocol import RankReport, WeightBytes
from parallel.channel import Channel
from parallel.group import CollectiveError
from parallel.launch import RankProcesses

_DIAGNOSIS_S = 2.0
"""Time to look for the first cause of a failure."""

log = logging.getLogger(__name__)


class RankHealth:
    """Health of the ranks 1 … size - 1, from their reports and from the state of their processes."""

    def __init__(
        self,
        channel: Channel,
        *,
        timeout_s: float,
        processes: RankProcesses | None = None,
        hosts: Mapping[int, str] | None = None,
    ) -> None:
        """channel: to all of them. timeout_s: time-out of a collective. processes: the ranks' processes, if they are
        this process's children. hosts: the ranks' hosts, for messages.
        """
        self.ranks = sorted(channel.open)
        self.weight_bytes = WeightBytes()  # sum over these ranks, once they are ready
        self._channel = channel
        self._timeout_s = timeout_s
        self._processes = processes
        self._hosts = hosts or {}
        self._unreported = set(self.ranks)  # ranks that have not reported why they end
        self._failures: dict[int, RankReport] = {}
        self._refusals: dict[int, str] = {}
        self._num_reports = dict.fromkeys(self.ranks, 0)  # of each rank, failures not counted
        self._decoder = msgspec.msgpack.Decoder(RankReport)

    # -- listening ---------------------------------------------------------------------------------------------------

    def listen(self, timeout_s: float) -> None:
        """Read the reports that have arrived; wait at most timeout_s for one."""
        for rank, frame in self._channel.frames(timeout_s):
            report = RankReport() if frame is None else self._decoder.decode(frame)
            if frame is None or report.failure is not None:
                self._unreported.discard(rank)
            if report.failure is not None:
                self._failures.setdefault(rank, report)
            elif frame is not None:
                self._num_reports[rank] += 1
                self.weight_bytes += report.weight_bytes
                if report.refusal is not None:
                    self._refusals[rank] = report.refusal

    def take_refusal(self) -> str | None:
        """Return why the first rank that refused a step did so, and forget all refusals."""
        refusals, self._refusals = self._refusals, {}
        return next((f"{self.names([rank])}: {reason}" for rank, reason in sorted(refusals.items())), None)

    @property
    def broken(self) -> bool:
        """Whether a rank has ended, or has reported that it does."""
        return bool(self._failures) or len(self._channel.open) < len(self.ranks)

    def late(self, number: int) -> list[int]:
        """Ranks that have sent fewer than `number` reports."""
        return [rank for rank, count in self._num_reports.items() if count < number]

    # -- diagnosis ---------------------------------------------------------------------------------------------------

    def diagnose(self, error: CollectiveError | None) -> str:
        """Find the first cause and describe it. error: rank 0's own, if a collective failed there."""
        deadline = time.monotonic() + _DIAGNOSIS_S
        while (
            (cause := self._find_first_failure()) is None
            and self._may_report()
            and (left := deadline - time.monotonic()) > 0
        ):
            self.listen(left)
        ended = [] if cause else sorted(rank for rank, report in self._failures.items() if report.signalled)
        reason = cause or self._describe_unknown_cause(error, ended)
        log.log(logging.INFO if ended else logging.ERROR, "%s", reason)
        return reason

    def names(self, ranks: list[int]) -> str:
        """Name ranks in messages: `ranks 1, 2`; where hosts are known, `rank 3 (host b)`."""
        names = [f"{rank} (host {self._hosts[rank]})" if rank in self._hosts else str(rank) for rank in ranks]
        return f"rank{'s' * (len(names) > 1)} {', '.join(names)}"

    def _may_report(self) -> bool:
        """Whether a rank can still report its reason; a rank that a signal has stopped cannot."""
        return any(not (self._processes and self._processes.is_stopped(rank)) for rank in self._unreported)

    def _find_first_failure(self) -> str | None:
        """Find a failure that is not the consequence of another rank's end."""
        for rank, report in self._failures.items():
            if not report.lost:
                return f"{self.names([rank])} {report.failure}"
        gone = set(self.ranks) - self._channel.open
        for rank in sorted(gone - set(self._failures)):
            if self._processes and (ended := self._processes.exit_description(rank, _DIAGNOSIS_S)):
                return f"rank {rank} {ended}"
            if self._processes and self._processes.is_stopped(rank):
                return f"rank {rank} took no plan for {self._timeout_s:g} s (stopped by a signal)"
            return f"{self.names([rank])} cannot be reached"
        return None

    def _describe_unknown_cause(self, error: CollectiveError | None, ended: list[int]) -> str:
        """Describe a failure without a known cause: a rank hangs, or was ended from outside.

        ended: ranks that were ended from outside.
        """
        if ended:
            return f"{self.names(ended)} got a signal to end, or lost the torchrun agent"
        stopped = [rank for rank in sorted(self._unreported) if self._processes and self._processes.is_stopped(rank)]
        late = stopped or ([error.rank] if error and error.rank is not None else sorted(self._unreported))
        if not late:
            reason = error or next(report.failure for report in self._failures.values())
            return f"the ranks lost each other: {reason}"
        why = " (stopped by a signal)" if stopped else ""
        return f"{self.names(late)} did not answer within {self._timeout_s:g} s{why}"
