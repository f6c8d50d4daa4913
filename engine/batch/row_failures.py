"""Failures of single rows. What goes wrong for one row inside a round fails that row's request; the round goes on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch

from engine.oom import is_out_of_memory
from kernels.ragged import Ints
from parallel.group import CollectiveError, RankFailure, RoundAbandoned

log = logging.getLogger(__name__)

_ROUND_ERRORS = (
    *(CollectiveError, RankFailure, RoundAbandoned, torch.AcceleratorError),
    *(KeyboardInterrupt, SystemExit, GeneratorExit),
)
"""Errors that concern all rows, wherever they are raised."""


class RowError(RuntimeError):
    """A row cannot go on, and its request is the cause."""


class RowFailures:
    """Rows of one rank whose requests have failed, until another request starts in their slot.

    Host code that runs for one row - grammars, logits processors, drafters - runs inside `guard`. A failed row stays in
    its round, so that every rank makes the same collectives; it gets logits that are not numbers, from which all ranks
    see that it has failed, also if this rank alone has failed it (Sampler.choose).
    """

    def __init__(self, max_rows: int) -> None:
        self._failed = np.zeros(max_rows, dtype=bool)
        self._causes: dict[int, tuple[str, bool]] = {}

    def start(self, row: int) -> None:
        """Start a request in a row slot."""
        self._failed[row] = False
        self._causes.pop(row, None)

    @contextmanager
    def guard(self, row: int, what: str) -> Iterator[None]:
        """Fail the row instead of the round if the body raises. what: names the body's work in the reason.

        Passes on errors that concern all rows: of memory, of devices and of other ranks.
        """
        try:
            yield
        except BaseException as error:  # a panic of a library in Rust is no Exception
            if isinstance(error, _ROUND_ERRORS) or is_out_of_memory(error):
                raise
            is_request_fault = isinstance(error, RowError)
            if not is_request_fault:
                log.exception("%s of a request failed, and ends it", what)
            reason = (
                f"{what} failed: {error}" if is_request_fault else f"{what} failed: {type(error).__name__}: {error}"
            )
            self._failed[row] = True
            self._causes.setdefault(row, (reason, is_request_fault))

    def cause(self, row: int) -> tuple[str, bool] | None:
        """Return why this rank has failed the row, and whether the request is the cause; None if it has not."""
        return self._causes.get(row)

    def among(self, rows: Ints) -> Ints:
        """Return the indices of the entries of `rows` that have failed."""
        return np.flatnonzero(self._failed[rows])

    def healthy(self, rows: Ints, mask: npt.NDArray[np.bool_]) -> Ints:
        """Return the indices of the entries of `rows` for which `mask` [max_rows] is set, without failed rows."""
        return np.flatnonzero(mask[rows] & ~self._failed[rows])
