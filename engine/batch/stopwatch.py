"""Timing of work that a device does asynchronously to the host."""

from __future__ import annotations

import time

import torch


class Stopwatch:
    """Context manager that sums the time of its `with` blocks.

    On CUDA the blocks only enqueue work: events are recorded around it, and `take` reads them. Call `take` when the
    host has waited for the device anyway.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds = 0.0
        self._began = 0.0

    def __enter__(self) -> None:
        if self._cuda:
            self._events.append((_event(), _event()))
            self._events[-1][0].record()
        else:
            self._began = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        if self._cuda:
            self._events[-1][1].record()
        else:
            self._seconds += time.perf_counter() - self._began

    def reset(self) -> None:
        """Discard the time since the last `take`."""
        self._seconds, self._events = 0.0, []

    def take(self) -> float:
        """Return the seconds measured since the last call."""
        milliseconds: float = sum(begin.elapsed_time(end) for begin, end in self._events)
        seconds = self._seconds + milliseconds / 1e3
        self.reset()
        return seconds


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
