"""What rank 0 hears from the other ranks and, once something is wrong, which of them it is and why."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

import msgspec

from engine.ranks.protocol import Report, WeightBytes
from parallel.channel import Channel
from parallel.group import CollectiveError
from parallel.launch import RankProcesses

_LAST_WORD_S = 2.0
"""How long to look for the first cause once something is wrong."""

log = logging.getLogger(__name__)


class Roster:
    """The ranks 1 … size - 1 as their reports show them, and as the system does."""

    def __init__(
        self,
        channel: Channel,
        *,
        timeout_s: float,
        processes: RankProcesses | None = None,
        hosts: Mapping[int, str] | None = None,
    ) -> None:
        """channel: to all of them. timeout_s: of a collective. processes: theirs, if they are this process's children.
        hosts: where the others run, for messages.
        """
        self.ranks = sorted(channel.open)
        self.weight_bytes = WeightBytes()  # of all these ranks, once they are ready
        self._channel = channel
        self._timeout_s = timeout_s
        self._processes = processes
        self._hosts = hosts or {}
        self._silent = set(self.ranks)  # ranks that have not said why they go
        self._reports: dict[int, Report] = {}  # why they go
        self._hellos = dict.fromkeys(self.ranks, 0)  # reports of each, without those
        self._decoder = msgspec.msgpack.Decoder(Report)

    # -- listening ---------------------------------------------------------------------------------------------------

    def listen(self, timeout_s: float) -> None:
        """Take in what the ranks have said; wait at most timeout_s for it."""
        for rank, frame in self._channel.news(timeout_s):
            report = Report() if frame is None else self._decoder.decode(frame)
            if frame is None or report.failure is not None:
                self._silent.discard(rank)
            if report.failure is not None:
                self._reports.setdefault(rank, report)
            elif frame is not None:
                self._hellos[rank] += 1
                self.weight_bytes += report.weight_bytes

    @property
    def broken(self) -> bool:
        """Whether a rank has gone, or has said that it goes."""
        return bool(self._reports) or len(self._channel.open) < len(self.ranks)

    def late(self, number: int) -> list[int]:
        """Ranks that have not sent so many reports yet."""
        return [rank for rank, count in self._hellos.items() if count < number]

    # -- blame -------------------------------------------------------------------------------------------------------

    def diagnose(self, error: CollectiveError | None) -> str:
        """The first cause of what went wrong. error: how it shows on rank 0, if it was a collective that failed."""
        deadline = time.monotonic() + _LAST_WORD_S
        while (cause := self._cause()) is None and self._may_speak() and (left := deadline - time.monotonic()) > 0:
            self.listen(left)
        # Ranks that were told to end, unless there is more to it.
        told = [] if cause else sorted(rank for rank, report in self._reports.items() if report.told)
        why = cause or self._suspicion(error, told)
        log.log(logging.INFO if told else logging.ERROR, "%s", why)
        return why

    def names(self, ranks: list[int]) -> str:
        """`ranks 1, 2`; where hosts are known, `rank 3 (host b)`."""
        names = [f"{rank} (host {self._hosts[rank]})" if rank in self._hosts else str(rank) for rank in ranks]
        return f"rank{'s' * (len(names) > 1)} {', '.join(names)}"

    def _may_speak(self) -> bool:
        """Whether the reason of some rank can still come: one that a signal holds says nothing."""
        return any(not (self._processes and self._processes.is_stopped(rank)) for rank in self._silent)

    def _cause(self) -> str | None:
        """What cannot be the consequence of another rank's end."""
        for rank, report in self._reports.items():
            if not report.lost:
                return f"{self.names([rank])} {report.failure}"
        gone = set(self.ranks) - self._channel.open
        for rank in sorted(gone - set(self._reports)):
            if self._processes and (ended := self._processes.how_it_ended(rank, _LAST_WORD_S)):
                return f"rank {rank} {ended}"
            if self._processes and self._processes.is_stopped(rank):
                return f"rank {rank} took no plan for {self._timeout_s:g} s (stopped by a signal)"
            return f"{self.names([rank])} is out of reach"
        return None

    def _suspicion(self, error: CollectiveError | None, told: list[int]) -> str:
        """Nobody is dead, nobody has failed by itself: somebody hangs, or was told to end."""
        if told:
            return f"{self.names(told)} got a signal to end, or lost the torchrun agent"
        stopped = [rank for rank in sorted(self._silent) if self._processes and self._processes.is_stopped(rank)]
        late = stopped or ([error.rank] if error and error.rank is not None else sorted(self._silent))
        if not late:
            reason = error or next(report.failure for report in self._reports.values())
            return f"the ranks lost each other: {reason}"
        why = " (stopped by a signal)" if stopped else ""
        return f"{self.names(late)} did not answer within {self._timeout_s:g} s{why}"
