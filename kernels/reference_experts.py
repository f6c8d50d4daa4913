"""Mixtures of experts in plain torch (Mixtral, arXiv 2401.04088), the reference for all other implementations.

A router's scores s give each token its networks and their weights: p = softmax(s) over all networks; those with the
`per_token` largest p compute the token, of equal ones the first; their weights are p, or p / (sum of theirs). A
token's result is the sum of weight * network(token) in the order of the networks' numbers, and depends on no
other token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.ops import Linear
from kernels.row_sums import row_sum


def choose_experts(scores: Tensor, per_token: int, normalised: bool) -> tuple[Tensor, Tensor]:
    """Choose the networks of each token. scores: [tokens, networks], in float32 or wider.

    Returns their numbers, [tokens, per_token] int64, ascending, and their weights, likewise in the dtype of scores.
    Tokens change no bit of each other.
    """
    shares = torch.softmax(scores, dim=-1)
    largest = shares.sort(dim=-1, descending=True, stable=True).indices[:, :per_token]
    chosen = largest.sort(dim=-1).values
    weights = shares.gather(-1, chosen)
    return chosen, weights / row_sum(weights) if normalised else weights


class LoopedExperts:
    """One network after the other, each over the tokens that chose it. The host waits for the choice."""

    def __init__(self, networks: Sequence[tuple[Linear, Linear]], per_token: int, normalised: bool) -> None:
        self._networks, self._per_token, self._normalised = tuple(networks), per_token, normalised

    def __call__(self, x: Tensor, scores: Tensor) -> Tensor:
        chosen, weights = choose_experts(scores, self._per_token, self._normalised)
        order = chosen.flatten().sort(stable=True).indices
        token, factor = order // self._per_token, weights.flatten()[order, None]
        counts = torch.bincount(chosen.flatten(), minlength=len(self._networks)).tolist()
        total: Tensor | None = None
        start = 0
        for (gate_up, down), count in zip(self._networks, counts, strict=True):
            if not count:
                continue
            mine = token[start : start + count]
            y = down(gate_up(x.index_select(0, mine))) * factor[start : start + count]
            if total is None:
                total = y.new_zeros(len(x), y.shape[1])
            total.index_add_(0, mine, y)
            start += count
        if total is None:  # no tokens
            total = self._networks[0][1](self._networks[0][0](x))
        return total
