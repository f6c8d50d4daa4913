"""Accepting drafts and committing them, in plain torch; kernels.gpu.acceptance is the twin.

What a round decides about a row is one line of its ledger, [rows, 4] int64: the row's slot; how many of its committed
tokens get their KV in the round (new); which decision is its first one; and how many it has. A row that decides nothing
has 0 of them.

    tokens of a row   [ committed ........................... ) drafts
                      [ computed .......... ) new ............ )^ the first decision
"""

from __future__ import annotations

import torch
from torch import Tensor


def accept(tokens: Tensor, computed: Tensor, ledger: Tensor, drafted: Tensor, chosen: Tensor, most: int) -> Tensor:
    """Accept each row's drafts up to the first that is not what the target chose there. Changes nothing.

    tokens: [max_rows, max_len] int32; a row's drafts stand behind its committed tokens. computed: [max_rows] int64.
    ledger: [rows, 4]. drafted: [rows] int64, how many drafts count, less than the row's decisions. chosen: [decisions]
    int64. most: decisions of a row. Returns [rows, 2 + most] int64: drafted, accepted, and the row's choices, of which
    accepted + 1 count; those behind the last one are any token.
    """
    slot, new, first, count = ledger.unbind(1)
    step = torch.arange(most, device=tokens.device)
    choices = _padded(chosen)[(first[:, None] + step).clamp_(max=len(chosen))]
    place = ((computed[slot] + new)[:, None] + step).clamp_(max=tokens.shape[1] - 1)
    agrees = (tokens[slot[:, None], place] == choices) & (step < torch.minimum(drafted, count - 1)[:, None])
    return torch.cat([drafted[:, None], agrees.cumprod(1).sum(1, keepdim=True), choices], 1)


def commit(tokens: Tensor, computed: Tensor, ledger: Tensor, verdict: Tensor) -> None:
    """Make `verdict` ([rows, 2 + most], see `accept`) the state: tokens and computed, in place.

    Choices behind the first disagreement are written too: they are beyond the committed length and count for nothing,
    just as the KV of rejected drafts does.
    """
    slot, new, _, count = ledger.unbind(1)
    step = torch.arange(verdict.shape[1] - 2, device=tokens.device)
    place = (computed[slot] + new)[:, None] + step
    inside = step < count[:, None]
    # What is not the row's to write is written to where it stands already.
    place = torch.where(inside, place, (computed[slot] + new - 1)[:, None])
    kept = tokens[slot[:, None], place]
    tokens[slot[:, None], place] = torch.where(inside, verdict[:, 2:].to(torch.int32), kept)
    computed[slot] += new + verdict[:, 1]


def _padded(chosen: Tensor) -> Tensor:
    """With one token more, for rows that have fewer decisions."""
    return torch.cat([chosen, chosen.new_zeros(1)])
