"""Weights that all ranks hold: replaced, released and loaded back on every rank alike."""

from __future__ import annotations

import logging
from collections.abc import Callable

from engine.plan import WeightAction, WeightStep

log = logging.getLogger(__name__)


class WeightsRefused(ValueError):
    """Some rank cannot use weights; the message gives the reason. The weights in force are what they were."""


class ResidentWeights:
    """Weights of the target, on all ranks, with all that is built around them. Use between rounds only; each change but
    `check` empties every rank's rows and KV.

    asleep: whether they are released.
    """

    def __init__(self, path: str, perform: Callable[[WeightStep], str | None]) -> None:
        """path: directory that they were loaded from. perform: performs a step on all ranks, and returns why one of
        them refuses it."""
        self._path, self._perform = path, perform
        self.asleep = False

    def check(self, path: str) -> None:
        """Raise WeightsRefused unless the directory `path` can replace the weights on every rank: it has the config of
        the model in use, and tensors of the same names and shapes."""
        self._step("check", path)

    def replace(self, path: str) -> None:
        """Replace the weights by those of a directory that was checked; while asleep, `wake_up` loads them. Raises
        WeightsRefused if they can nevertheless not be loaded, RuntimeError if then the former ones cannot either."""
        if not self.asleep:
            try:
                self._load(path)
            except WeightsRefused:
                try:
                    self._load(self._path)
                except WeightsRefused as error:
                    log.error("the former weights: %s", error)
                    raise RuntimeError("the former weights cannot be loaded back") from None
                raise
        self._path = path

    def release(self) -> None:
        """Free the weights, and the KV pools."""
        self.asleep = True
        self._step("release")

    def wake_up(self) -> None:
        """Load the weights from where they came, if they are released. Raises WeightsRefused: they still are."""
        if not self.asleep:
            return
        self._step("check", self._path)
        try:
            self._load(self._path)
        except WeightsRefused:
            self._step("release")
            raise
        self.asleep = False

    def _load(self, path: str) -> None:
        self._step("load", path)
        self._step("build")

    def _step(self, action: WeightAction, path: str = "") -> None:
        refusal = self._perform(WeightStep(action, path))
        if refusal is not None:
            raise WeightsRefused(refusal)
