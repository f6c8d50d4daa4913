"""Measure the time in which a device is busy: the union of the intervals in which its kernels and copies run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]

from bench.micro.bandwidth import wait


def busy_seconds(work: Callable[[], object], device: torch.device) -> float | None:
    """Run `work` under the profiler. Returns the seconds in which the device is busy; None where it cannot be profiled.

    The profiler slows the host's launches, not the kernels: divide this by a time measured without the profiler.
    """
    if device.type != "cuda":
        return None
    wait(device)
    try:
        watch = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        watch.__enter__()  # type: ignore[no-untyped-call]
    except RuntimeError:
        return None
    try:
        work()
        wait(device)
    finally:
        watch.__exit__(None, None, None)  # type: ignore[no-untyped-call]
    spans = device_spans(watch.events() or ())  # type: ignore[no-untyped-call]
    return covered(spans) / 1e6 if spans else None


def device_spans(events: Iterable[Any]) -> list[tuple[float, float]]:
    """List when the device worked, as (start, end) in microseconds, rising. events: the profiler's.

    Left out: the host's calls of the CUDA runtime, which the profiler lists too, and annotations, whose intervals
    contain the pauses between kernels.
    """
    return sorted(
        (event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    )


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """Compute the length of the union of (start, end) spans, given in ascending order."""
    total, reached = 0.0, float("-inf")
    for start, end in spans:
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
