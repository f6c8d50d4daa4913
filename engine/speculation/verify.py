"""Verification by coupled sampling: the only source of output tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.rows import Decisions
from engine.sampling import Logprobs, Sampler


@dataclass(frozen=True, slots=True)
class Verdict:
    """accepted: [rows] int64, drafts that hold. tokens: [rows, gamma_max + 1] int64, of which the first accepted + 1
    count: the drafts that hold, and the bonus token. chosen: [n] int64, the same by decision; committed: [n] bool,
    which of them count."""

    accepted: Tensor
    tokens: Tensor
    chosen: Tensor
    committed: Tensor
    logprobs: Logprobs | None


def verify(
    drafts: Tensor, gamma: Tensor, logits: Tensor, decisions: Decisions, grid: Tensor, sampler: Sampler
) -> Verdict:
    """Accept each row's drafts up to the first that is not what the target chooses there.

    The target's choice is made by `sampler` from the target's logits alone - what was drafted enters only as the
    context that those logits saw - so output with speculation is output without.

    drafts: [rows, gamma_max] int64, padded. gamma: [rows] int64, how many are drafts. logits: [n, this rank's
    vocabulary], changed in place. grid: [rows, gamma_max + 1] int64, which of the n decisions follows draft j of a row
    (column 0: follows its committed tokens).
    """
    report = sampler.logprobs(logits, decisions)
    chosen = sampler.choose(logits, decisions)
    tokens = chosen[grid]
    steps = torch.arange(drafts.shape[1], device=drafts.device)
    agrees = (drafts == tokens[:, :-1]) & (steps < gamma[:, None])
    accepted = agrees.cumprod(-1).sum(-1)
    committed = decisions.offset <= accepted.repeat_interleave(gamma + 1, output_size=len(chosen))
    return Verdict(accepted, tokens, chosen, committed, report(chosen) if report else None)
