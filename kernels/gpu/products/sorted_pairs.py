"""Pairs of a token and one of its networks, sorted by network on the device, and cut into blocks of one network each.

The largest number of blocks depends on the number of tokens alone, so the host waits for nothing and the work can be
captured; programs of blocks that are not needed return at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_ROWS = (16, 32, 64)
"""Rows of a block: as many as a network has on average, within these. Tensor cores take 16 or more."""


@dataclass(frozen=True, slots=True)
class SortedPairs:
    """Pairs of a token and a network, by network.

    order: [pairs] int64, the numbers of pairs, by network; pair n is of token n // per_token. factors: [pairs], weights
    of the pairs, by their number. networks, firsts, ends: [blocks] int64, the network of each block, its first pair in
    that order, and the end of its network's; a block without rows has first >= end. rows: largest number of a block's.
    per_token: networks of a token.
    """

    order: Tensor
    factors: Tensor
    networks: Tensor
    firsts: Tensor
    ends: Tensor
    rows: int
    per_token: int


def sort_pairs(chosen: Tensor, factors: Tensor, count: int) -> SortedPairs:
    """Sort pairs by network. chosen, factors: [tokens, per_token], numbers of networks and their weights. count: of
    all networks. Enqueues only."""
    pairs = chosen.numel()
    rows = next((each for each in _ROWS if each * count >= pairs), _ROWS[-1])
    blocks = min(pairs, count + pairs // rows)
    ordered, order = chosen.flatten().sort(stable=True)
    numbers = torch.arange(max(blocks, count + 1), device=chosen.device)
    bounds = torch.searchsorted(ordered, numbers[: count + 1])
    needed = (bounds.diff() + (rows - 1)) // rows
    until = needed.cumsum(0)
    block = numbers[:blocks]
    network = torch.searchsorted(until, block, right=True)
    unused = network == count
    network = network.masked_fill(unused, 0)
    first = bounds[network] + (block - (until - needed)[network]) * rows
    ends = bounds[1:][network].masked_fill(unused, 0)
    return SortedPairs(order, factors.flatten(), network, first, ends, rows, chosen.shape[1])
