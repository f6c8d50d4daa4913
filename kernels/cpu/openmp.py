"""OpenMP threads of torch's own operators: they sleep while they wait."""

from __future__ import annotations

import os


def sleep_while_waiting() -> None:
    """Let torch's OpenMP threads sleep at once when they have no work; takes effect if torch is not loaded yet.

    By default they spin for milliseconds after each parallel operator, on cores that the kernels' own threads
    (csrc/pool.h) need by then, or another process. An own setting of the user stays.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
