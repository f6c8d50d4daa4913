"""Verification by coupled sampling: the only source of output tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.rows import Round
from engine.sampling import Logprobs, PromptReport, Sampler


@dataclass(frozen=True, slots=True)
class Verdict:
    """drafted: [rows] int64, tokens that were proposed. accepted: [rows] int64, how many of them hold.
    tokens: [rows, gamma_max + 1] int64, of which the first accepted + 1 count: the drafts that hold, and the bonus.
    chosen: [n] int64, the same by decision; committed: [n] bool, which of them count."""

    drafted: Tensor
    accepted: Tensor
    tokens: Tensor
    chosen: Tensor
    committed: Tensor
    logprobs: Logprobs | None
    prompts: PromptReport | None = None


def verify(drafts: Tensor, drafted: Tensor, logits: Tensor, rows: Round, sampler: Sampler) -> Verdict:
    """Accept each row's drafts up to the first that is not what the target chooses there.

    The target's choice is made by `sampler` from the target's logits alone - what was drafted enters only as the
    context that those logits saw - so output with speculation is output without.

    drafts: [rows, gamma_max] int64, padded. drafted: [rows] int64, how many of them count. logits: [n, this rank's
    vocabulary] of `rows.decisions`, and behind them of prompt tokens that are told theirs; changed in place.
    """
    prompts = sampler.prompts(logits[len(rows.decisions.rows) :], rows) if rows.told.any() else None
    logits = logits[: len(rows.decisions.rows)]
    report = sampler.logprobs(logits, rows.decisions)
    chosen = sampler.choose(logits, rows.decisions)
    tokens = chosen[rows.grid]
    steps = torch.arange(drafts.shape[1], device=drafts.device)
    agrees = (drafts == tokens[:, :-1]) & (steps < drafted[:, None])
    accepted = agrees.cumprod(-1).sum(-1)
    committed = rows.decisions.offset <= accepted[rows.owner]
    return Verdict(drafted, accepted, tokens, chosen, committed, report(chosen) if report else None, prompts)
