"""Interface of controllers, which choose the number of drafts of each row, and the fixed controller."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from engine.ngram.ngram_drafts import Proposal
from engine.plan import DrafterName, RoundPlan, RoundResult
from engine.scheduler.request import Request


@dataclass(slots=True)
class ControllerReport:
    """A controller's totals over the rounds so far that only decoded. Zeros where it keeps none.

    decode_seconds: time of these rounds. plain_seconds: estimated time of the same tokens without drafts.
    forecast_seconds: time predicted when the rounds were chosen. alpha: newest estimate of the probability that a
    drafted token is accepted.
    """

    decode_seconds: float = 0.0
    plain_seconds: float = 0.0
    forecast_seconds: float = 0.0
    alpha: float = 0.0


class RowDrafts(NamedTuple):
    """Drafts of one row in a round: the first `proposed` tokens found in its text, and `model` tokens that a model
    drafts after them. latest: see RowWork."""

    proposed: int = 0
    model: int = 0
    latest: bool = False


class Way(NamedTuple):
    """How a model drafts in a round. budget, drafter: see RoundPlan."""

    budget: int = 0
    drafter: DrafterName | None = None


class DraftReads(NamedTuple):
    """KV that a model's drafts read. tokens_read: maps a row's tokens and a budget to the KV slots that a draft step
    reads; budget 0: the configured one. share: see KVSettings.shares_pages."""

    tokens_read: Callable[[int, int], int]
    share: bool = True


class Controller(Protocol):
    """Interface of controllers. Host-side, O(rows) per round."""

    @property
    def report(self) -> ControllerReport: ...

    @property
    def way(self) -> Way:
        """How a model drafts in the latest chosen round."""
        ...

    @property
    def gamma_max(self) -> int:
        """Largest number of drafts per row and round."""
        ...

    @property
    def takes_text(self) -> bool:
        """Whether it may choose drafts that were found in text. If not, nobody searches."""
        ...

    def begin_round(self) -> None:
        """Begin a round, with decoding rows or without. A choice that was not observed is of a round that failed: it is
        dropped, and teaches nothing."""
        ...

    def choose(
        self,
        rows: Sequence[Request],
        shared_tokens: int = 0,
        proposals: Sequence[Proposal] = (),
        share: int | None = None,
    ) -> list[RowDrafts]:
        """Choose the drafts of each decoding row; none is plain decoding.

        proposals: tokens found in the text of each row, none where nothing was; may be left out. shared_tokens: KV
        tokens of the rows' contexts that need no reading, because another row of the batch has the same pages and
        attention reads them once for all (Ops.shared_stretch). share: largest number of drafts of a row, where all rows
        share what the round can compute; None: any.
        The scheduler may lower them, never raise them. It calls this once per round that has decoding rows.
        """
        ...

    def observe(self, plan: RoundPlan, requests: Sequence[Request], result: RoundResult) -> None:
        """Learn from the round's time and its accepted drafts. requests: those of plan.work, after the commit."""
        ...


def shared_in_part(shared_tokens: float, contexts: Sequence[int], part: Sequence[int]) -> float:
    """Estimate how many of a batch's shared tokens remain shared in a part of its rows. contexts, part: tokens of all
    rows, and of those in the part.

    Of k rows that begin with the same tokens all but one share them. So this is exact for rows of one length that all
    have the same prefix.
    """
    if len(part) < 2:
        return 0.0
    return shared_tokens * sum(part) / sum(contexts) * (1 - 1 / len(part)) / (1 - 1 / len(contexts))


def shared_by_drafts(
    shared_tokens: float,
    contexts: Sequence[int],
    drafting: Sequence[int],
    tokens_read: Callable[[int, int], int],
    budget: int,
    step: int = 0,
) -> float:
    """Estimate how many of a batch's shared tokens a draft step need not read. contexts, drafting: tokens of all rows,
    and of those that draft. tokens_read: maps a row's tokens and a budget to the KV tokens that a draft step reads.
    step: number of drafts that the rows have already.

    Drafts that read whole contexts share as the target does. A window begins with the sink alone, too little to be
    read for several rows at once, and goes on with tokens that rows seldom share: it shares nothing.
    """
    whole = [context for context in drafting if tokens_read(context + step, budget) >= context + step]
    return shared_in_part(shared_tokens, contexts, whole)


class FixedGamma:
    """The same gamma for every row and round: tokens found in the text, as far as there are any, then a model's."""

    def __init__(self, gamma: int, *, model: bool = True) -> None:
        """model: whether there is a model that drafts."""
        self._gamma, self._model = gamma, model
        self.report = ControllerReport()
        self.way = Way()

    @property
    def gamma_max(self) -> int:
        return self._gamma

    @property
    def takes_text(self) -> bool:
        return self._gamma > 0

    def begin_round(self) -> None:
        """Do nothing: no choice is kept."""

    def choose(
        self,
        rows: Sequence[Request],
        shared_tokens: int = 0,
        proposals: Sequence[Proposal] = (),
        share: int | None = None,
    ) -> list[RowDrafts]:
        counts = [min(len(proposal.tokens), self._gamma) for proposal in proposals] or [0] * len(rows)
        return [RowDrafts(count, self._gamma - count if self._model else 0) for count in counts]

    def observe(self, plan: RoundPlan, requests: Sequence[Request], result: RoundResult) -> None:
        """Do nothing: a fixed choice does not learn."""
