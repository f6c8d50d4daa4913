"""Verification: the only source of output tokens. It accepts the drafts that equal the target's own tokens, which
`sampler.choose` samples: coupled with the draft's by default (engine.sampling.sampler), or by the rejection rule
(engine.speculation.rejection)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.batch.round_batch import RoundBatch
from engine.sampling.sampler import LogprobTensors, PromptLogprobTensors, Sampler


@dataclass(frozen=True, slots=True)
class Verdict:
    """Outcome of a round, for all its rows.

    rows: [rows, 2 + max_samples] int64: number of drafts proposed; number accepted; and the target's tokens, of which
        accepted + 1 count: the accepted drafts, and the bonus token.
    target_tokens: [samples] int64, the target's token at each sampled position.
    """

    rows: Tensor
    target_tokens: Tensor
    logprobs: LogprobTensors | None
    prompt_logprobs: PromptLogprobTensors | None = None

    @property
    def accepted(self) -> Tensor:
        """[rows] int64."""
        return self.rows[:, 1]


def verify(drafted: Tensor, logits: Tensor, batch: RoundBatch, sampler: Sampler) -> Verdict:
    """Sample the target's token at every position, and accept drafts that equal it.

    With coupled sampling, the sampler reads the target's logits alone: drafts enter only as the context of those
    logits, so output with speculation equals output without. With the rejection rule it also reads the drafts'
    probabilities, and output has the same distribution as without.

    drafted: [rows] int64, number of tokens placed after each row. logits: [n, this rank's vocabulary], as
    `batch.verify_inputs` asks for them; changed in place.
    """
    logits, prompt_logits = logits.tensor_split([len(batch.samples.rows)])
    prompt_logprobs = sampler.prompt_logprobs(prompt_logits, batch) if len(prompt_logits) else None
    report = sampler.logprobs(logits, batch.samples)
    target_tokens = sampler.choose(logits, batch.samples)
    state = batch.state
    rows = (state.ops.accept or accept_drafts)(
        state.tokens, state.computed, batch.row_spans, drafted, target_tokens, batch.max_samples
    )
    return Verdict(rows, target_tokens, report(target_tokens) if report else None, prompt_logprobs)


def commit(verdict: Verdict, batch: RoundBatch) -> None:
    """Apply the verdict to the state: write the target's tokens, advance the counters."""
    state = batch.state
    (state.ops.commit or commit_tokens)(state.tokens, state.computed, batch.row_spans, verdict.rows)


# The reference of both rules. A device may do each in one launch (`Ops.accept`, `Ops.commit`).


def accept_drafts(
    tokens: Tensor, computed: Tensor, row_spans: Tensor, drafted: Tensor, target_tokens: Tensor, max_samples: int
) -> Tensor:
    """Accept each row's drafts up to the first one that is not the target's token there. Returns `Verdict.rows`.

    tokens: [max_rows, max_model_len] int32. computed: [max_rows] int64. row_spans: [rows, 4], see RoundBatch. drafted:
    [rows] int64, less than the row's samples. target_tokens: [samples] int64. max_samples: largest number of samples of
    a row.
    """
    slot, new, first, count = row_spans.unbind(1)
    step = torch.arange(max_samples, device=tokens.device)
    padded = torch.cat([target_tokens, target_tokens.new_zeros(1)])  # rows with fewer samples read beyond their own
    targets = padded[(first[:, None] + step).clamp_(max=len(target_tokens))]
    place = ((computed[slot] + new)[:, None] + step).clamp_(max=tokens.shape[1] - 1)
    agrees = (tokens[slot[:, None], place] == targets) & (step < torch.minimum(drafted, count - 1)[:, None])
    accepted = agrees.cumprod(1).sum(1)
    return torch.cat([drafted[:, None], accepted[:, None], targets], 1)


def commit_tokens(tokens: Tensor, computed: Tensor, row_spans: Tensor, rows: Tensor) -> None:
    """Write each row's target tokens and advance its length by its new and its accepted ones, in place.

    rows: `Verdict.rows`; the rest as in `accept_drafts`. Tokens after the first disagreement are written too: like the
    KV of rejected drafts, they are beyond the computed length and do not count.
    """
    slot, new, _, count = row_spans.unbind(1)
    length = computed[slot] + new
    step = torch.arange(rows.shape[1] - 2, device=tokens.device)
    owned = step < count[:, None]
    # A place that is not the row's is replaced by its last committed token, which keeps its value.
    place = torch.where(owned, length[:, None] + step, length[:, None] - 1)
    current = tokens[slot[:, None], place]
    tokens[slot[:, None], place] = torch.where(owned, rows[:, 2:].to(torch.int32), current)
    computed[slot] = length + rows[:, 1]
