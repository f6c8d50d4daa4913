"""Load torch and what uses it without collecting garbage."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def without_collecting() -> Iterator[None]:
    """Collect no garbage while the imports of the block run, and leave what they made out of every later collection.

    torch makes hundreds of thousands of objects that live as long as the process. To go through them takes a fifth of
    the time of loading it, and later tens of milliseconds at a time, between rounds.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        if collecting:
            gc.enable()
