"""Who decides how many tokens each row drafts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from engine.plan import StepPlan, StepResult
from engine.scheduler.request import Request


@dataclass(slots=True)
class Report:
    """What a controller makes of the rounds so far, in seconds of rounds that only decoded: what they took, what the
    same tokens would have taken without drafts, and what was promised. Zeros: it does not know.

    alpha: its newest estimate of the probability that a drafted token holds.
    """

    decode_seconds: float = 0.0
    plain_seconds: float = 0.0
    forecast_seconds: float = 0.0
    alpha: float = 0.0


class Controller(Protocol):
    """Host-side, O(rows) per round."""

    @property
    def report(self) -> Report: ...

    @property
    def budget(self) -> int:
        """What the drafts of the round that was chosen last read per row; 0: as configured."""
        ...

    @property
    def gamma_max(self) -> int:
        """Never more drafts per row and round than this."""
        ...

    def choose(self, rows: Sequence[Request]) -> list[int]:
        """Drafts per decoding row; 0 is plain decoding. The scheduler may lower them, never raise them.

        It asks once per round that has decoding rows.
        """
        ...

    def observe(self, plan: StepPlan, requests: Sequence[Request], result: StepResult) -> None:
        """Learn from what the round took and what was accepted. requests: those of plan.work, after the commit."""
        ...


class FixedGamma:
    """The same gamma for every row and round."""

    def __init__(self, gamma: int) -> None:
        self._gamma = gamma
        self.report = Report()
        self.budget = 0

    @property
    def gamma_max(self) -> int:
        return self._gamma

    def choose(self, rows: Sequence[Request]) -> list[int]:
        return [self._gamma] * len(rows)

    def observe(self, plan: StepPlan, requests: Sequence[Request], result: StepResult) -> None:
        """A fixed choice learns nothing."""
