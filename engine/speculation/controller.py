"""Who decides how many tokens each row drafts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from engine.plan import StepPlan, StepResult
from engine.request import Request


class Controller(Protocol):
    """Host-side, O(rows) per round."""

    @property
    def gamma_max(self) -> int:
        """Never more drafts per row and round than this."""
        ...

    def choose(self, rows: Sequence[Request]) -> list[int]:
        """Drafts per decoding row; 0 is plain decoding. The scheduler may lower them, never raise them."""
        ...

    def observe(self, plan: StepPlan, result: StepResult) -> None:
        """Learn from what the round took and what was accepted."""
        ...


class FixedGamma:
    """The same gamma for every row and round."""

    def __init__(self, gamma: int) -> None:
        self._gamma = gamma

    @property
    def gamma_max(self) -> int:
        return self._gamma

    def choose(self, rows: Sequence[Request]) -> list[int]:
        return [self._gamma] * len(rows)

    def observe(self, plan: StepPlan, result: StepResult) -> None:
        """A fixed choice learns nothing."""
