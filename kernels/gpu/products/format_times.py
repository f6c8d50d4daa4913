"""Times of products by weight format on this device, by which the format of drafts is chosen."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from statistics import median

import torch
from torch import Tensor

from kernels.fastest import fastest
from kernels.ops import Linear
from kernels.weights.matrix import Matrix
from kernels.weights.weight_format import FORMATS

ROWS = (1, 16, 64)
"""Numbers of rows that are measured."""
_SIZE = 4096
"""Rows and features of weights."""
_READ_BYTES = 256 << 20
"""Weights that are read in turn: more than the caches hold."""
_REPEATS = 16

Clock = Callable[[Callable[[], object]], float]
"""Runs work and returns its seconds on the device."""


def device_seconds(work: Callable[[], object]) -> float:
    """Measure work on the current CUDA device."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    work()
    end.record()
    end.synchronize()
    milliseconds: float = begin.elapsed_time(end)
    return 1e-3 * milliseconds


def fastest_format(make: Callable[[Matrix], Linear], max_rows: int, device: torch.device, clock: Clock) -> str | None:
    """Return the format in which products of up to `max_rows` rows take the least time; None: none is faster than
    dense. Takes a fraction of a second on a GPU, beside the compilation of its kernels.

    make: prepares a product. clock: measures it.
    """
    weight = torch.full((_SIZE, _SIZE), 0.01, dtype=torch.bfloat16, device=device)
    rows = [count for count in ROWS if count <= max_rows]
    inputs = [torch.full((count, _SIZE), 0.1, dtype=torch.bfloat16, device=device) for count in rows]
    times: list[dict[str, float]] = [{} for _ in rows]
    for name in FORMATS:
        first = make(FORMATS[name].quantize(weight))
        copies = [first, *(make(FORMATS[name].quantize(weight)) for _ in range(_READ_BYTES // first.nbytes))]
        for taken, x in zip(times, inputs, strict=True):
            taken[name] = _seconds(copies, x, clock)
    chosen = fastest(times)
    return None if chosen == "dense" else chosen


def _seconds(products: list[Linear], x: Tensor, clock: Clock) -> float:
    """Return the median seconds of one product, after one of each that is not counted."""
    for product in products:
        product(x)
    turns = cycle(products)
    return median(clock(lambda: next(turns)(x)) for _ in range(_REPEATS))
