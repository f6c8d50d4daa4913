"""What a controller knows of a model that drafts: its times, and how often its drafts are accepted."""

from __future__ import annotations

from collections.abc import Sequence

from engine.control.acceptance import AcceptanceEstimates
from engine.control.step_times import StepTimes
from engine.plan import DrafterName


class DraftingModel:
    """A model that drafts, as a controller knows it."""

    def __init__(
        self,
        times: StepTimes,
        budgets: Sequence[int],
        tokens_read: int | None = None,
        *,
        name: DrafterName | None = None,
        reads_latest: bool = False,
    ) -> None:
        """times: of this engine, with this model's draft steps. budgets: KV tokens per row that its drafts may read,
        the largest first; (0,) if there is no choice. tokens_read: largest number that they read; None: the largest
        budget, or all tokens if that is 0. name: see RoundPlan.drafter. reads_latest: whether rows choose what their
        drafts read, see RowWork.latest.
        """
        self.name = name
        self.times = times
        self.budgets = tuple(budgets)
        self.reads_latest = reads_latest
        self.acceptance = AcceptanceEstimates(budgets[0], tokens_read or budgets[0])

    @property
    def has_own_kv(self) -> bool:
        """Whether it can lack the KV of computed tokens (Request.draft_lag)."""
        return self.name != "self"
