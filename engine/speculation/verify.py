"""Verification by coupled sampling: the only source of output tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from engine.batch.rows import Round
from engine.sampling.sampler import Logprobs, PromptReport, Sampler


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of all rows of a round.

    rows: [rows, 2 + most decisions of a row] int64: how many tokens were proposed; how many of them hold; and the
    target's tokens, of which so many and one more count: the drafts that hold, and the bonus. chosen: [n] int64, the
    target's tokens by decision.
    """

    rows: Tensor
    chosen: Tensor
    logprobs: Logprobs | None
    prompts: PromptReport | None = None

    @property
    def accepted(self) -> Tensor:
        """[rows] int64."""
        return self.rows[:, 1]


def verify(drafted: Tensor, logits: Tensor, rows: Round, sampler: Sampler) -> Verdict:
    """Accept each row's drafts up to the first that is not what the target chooses there.

    The target's choice is made by `sampler` from the target's logits alone - what was drafted enters only as the
    context that those logits saw - so output with speculation is output without.

    drafted: [rows] int64, how many tokens were placed behind each row. logits: [n, this rank's vocabulary] of
    `rows.decisions`, and behind them of prompt tokens that are told theirs; changed in place.
    """
    prompts = sampler.prompts(logits[len(rows.decisions.rows) :], rows) if rows.told.any() else None
    logits = logits[: len(rows.decisions.rows)]
    report = sampler.logprobs(logits, rows.decisions)
    chosen = sampler.choose(logits, rows.decisions)
    return Verdict(rows.accept(drafted, chosen), chosen, report(chosen) if report else None, prompts)
