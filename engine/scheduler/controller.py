"""The interface of whatever decides how many tokens each row drafts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from engine.plan import RoundPlan, RoundResult
from engine.scheduler.request import Request


@dataclass(slots=True)
class ControllerReport:
    """A controller's account of the rounds so far that only decoded. Zeros where it keeps none.

    decode_seconds: time they took. plain_seconds: time the same tokens would have taken without drafts, as estimated.
    forecast_seconds: time predicted when the rounds were chosen. alpha: newest estimate of the probability that a
    drafted token is accepted.
    """

    decode_seconds: float = 0.0
    plain_seconds: float = 0.0
    forecast_seconds: float = 0.0
    alpha: float = 0.0


class Controller(Protocol):
    """Host-side, O(rows) per round."""

    @property
    def report(self) -> ControllerReport: ...

    @property
    def budget(self) -> int:
        """KV tokens that drafts of the round chosen last read per row; 0: as configured."""
        ...

    @property
    def gamma_max(self) -> int:
        """Largest number of drafts per row and round."""
        ...

    def choose(self, rows: Sequence[Request]) -> list[int]:
        """Choose the number of drafts of each decoding row; 0 is plain decoding. The scheduler may lower it, never
        raise it. Called once per round that has decoding rows.
        """
        ...

    def observe(self, plan: RoundPlan, requests: Sequence[Request], result: RoundResult) -> None:
        """Learn from the time that the round took and from what was accepted. requests: those of plan.work, after the
        commit."""
        ...


class FixedGamma:
    """The same gamma for every row and round."""

    def __init__(self, gamma: int) -> None:
        self._gamma = gamma
        self.report = ControllerReport()
        self.budget = 0

    @property
    def gamma_max(self) -> int:
        return self._gamma

    def choose(self, rows: Sequence[Request]) -> list[int]:
        return [self._gamma] * len(rows)

    def observe(self, plan: RoundPlan, requests: Sequence[Request], result: RoundResult) -> None:
        """A fixed choice learns nothing."""
