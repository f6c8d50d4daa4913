"""Choosing tokens over a vocabulary that is split across ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.group import Group


@dataclass(frozen=True, slots=True)
class VocabShard:
    """This rank's slice [start, start + size) of a vocabulary of `total` tokens, and what ranks agree on about it.

    Results are identical on every rank. With a group of one nothing is sent.
    """

    start: int
    size: int
    total: int
    group: Group

    def holds(self, tokens: Tensor) -> Tensor:
        """Which token ids are this rank's."""
        return (tokens >= self.start) & (tokens < self.start + self.size)

    def local(self, tokens: Tensor) -> Tensor:
        """Index into this rank's slice, clamped where the token is another rank's (see `holds`)."""
        return (tokens - self.start).clamp(0, self.size - 1)

    def argmax(self, logits: Tensor) -> Tensor:
        """The id of the largest logit of each row, the lowest id among equals; O(rows) traffic.

        logits: [rows, size]. Returns [rows] int64.
        """
        values, index = logits.max(-1)
        tokens = index + self.start
        if self.group.size == 1:
            return tokens
        pairs = torch.stack([values.double(), tokens.double()], -1)  # a double holds every token id exactly
        values, tokens = self.group.all_gather(pairs).unbind(-1)
        best = values.amax(0)
        return tokens.masked_fill(values < best, float("inf")).amin(0).long()

    def whole(self, logits: Tensor) -> Tensor:
        """Every rank's slice side by side: [rows, size] to [rows, total]. For the rows that cannot do with less."""
        if self.group.size == 1:
            return logits
        sizes = self.group.all_gather(torch.tensor([self.size], device=logits.device)).flatten().tolist()
        padded = torch.nn.functional.pad(logits, (0, max(sizes) - self.size)).contiguous()
        slices = self.group.all_gather(padded)
        return torch.cat([part[:, :size] for part, size in zip(slices, sizes, strict=True)], -1)


def truncation_threshold(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """The least logit that top-k, then top-p, and min-p keep; what ties with it is kept too.

    One number per row says it all, so a rank needs no more to cut its own slice.

    logits: [rows, vocabulary], the whole of it, already divided by the temperature.
    top_k: [rows] int64, 0 for off. top_p, min_p: [rows], 1 and 0 for off. Returns [rows].
    """
    ordered = logits.sort(-1, descending=True).values
    vocabulary = logits.shape[-1]
    kth = torch.where(top_k > 0, top_k, vocabulary).clamp(max=vocabulary) - 1
    least_of_k = ordered.gather(-1, kth[:, None])
    survivors = ordered.masked_fill(ordered < least_of_k, float("-inf"))
    probabilities = survivors.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # mass of everything more likely
    last = (before < top_p[:, None]).sum(-1, keepdim=True).clamp(min=1) - 1
    # top_p = 1 keeps all of top-k, whatever the rounding of the sum.
    least_of_p = torch.where(top_p[:, None] < 1, ordered.gather(-1, last), least_of_k)
    least_of_min_p = ordered[:, :1] + min_p[:, None].log()
    return torch.stack([least_of_k, least_of_p, least_of_min_p]).amax(0)[:, 0]
