"""Vocabulary shard: sampling operations over logits that are split across ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.row_sums import row_logsumexp
from parallel.group import Group
from parallel.split import split


@dataclass(frozen=True, slots=True)
class VocabShard:
    """This rank's slice [start, start + size) of a vocabulary of `total` tokens, and operations over all slices.

    Slices are those of parallel.split.split. Results are identical on every rank. A group of one sends nothing.
    """

    start: int
    size: int
    total: int
    group: Group

    def holds(self, tokens: Tensor) -> Tensor:
        """Return a mask of the token ids that are in this rank's slice."""
        return (tokens >= self.start) & (tokens < self.start + self.size)

    def local(self, tokens: Tensor) -> Tensor:
        """Convert token ids to indices into this rank's slice, clamped for tokens of other ranks (see `holds`)."""
        return (tokens - self.start).clamp(0, self.size - 1)

    def argmax(self, logits: Tensor) -> Tensor:
        """Find the id of the largest logit of each row, the lowest id among equals; O(rows) traffic.

        logits: [rows, size]. Returns [rows] int64.
        """
        values, index = logits.max(-1)
        return self.best(values, index + self.start)[1]

    def best(self, values: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Find, per row, the largest value over all ranks and its token, the lowest id among equals.

        values: [rows], this rank's largest. tokens: [rows] int64, their ids. Returns the values, [rows], NaN where a
        rank's is, and the tokens, [rows] int64.
        """
        if self.group.size == 1:
            return values, tokens
        pairs = torch.stack([values.double(), tokens.double()], -1)  # a double holds every token id exactly
        values, tokens = self.group.all_gather(pairs).unbind(-1)
        best = values.amax(0)
        return best, tokens.masked_fill(values < best, float("inf")).amin(0).long()

    def normalised(self, logits: Tensor) -> Tensor:
        """Compute this rank's log-probabilities [rows, size], with the softmax over all slices; O(rows) traffic."""
        return logits - self._over_ranks(row_logsumexp(logits))

    def _over_ranks(self, masses: Tensor) -> Tensor:
        """Add masses, given as logarithms, over all ranks: [rows, 1] to [rows, 1]."""
        return masses if self.group.size == 1 else row_logsumexp(self.group.all_gather(masses)[..., 0].T)

    def at_tokens(self, values: Tensor, tokens: Tensor) -> Tensor:
        """Look up each row's value at one token: values [rows, size], tokens [rows] int64; O(rows) traffic.

        Returns [rows]. Values may be -inf.
        """
        mine = values.gather(-1, self.local(tokens)[:, None])[:, 0].masked_fill(~self.holds(tokens), float("-inf"))
        return mine if self.group.size == 1 else self.group.all_gather(mine).amax(0)

    def rank(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """Compute the rank of `tokens` [rows] int64: 1 + the number of larger logits, [rows] int64; O(rows) traffic."""
        larger = (logits > self.at_tokens(logits, tokens)[:, None]).sum(-1)
        return 1 + (larger if self.group.size == 1 else self.group.all_gather(larger).sum(0))

    def logprobs(self, logits: Tensor, tokens: Tensor, num_alternatives: int) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the log-probabilities of `tokens`, and of the likeliest tokens; O(rows × num_alternatives) traffic.

        logits: [rows, size]. tokens: [rows] int64. num_alternatives: number of likeliest tokens, at most `total`.
        Returns [rows]; [rows, num_alternatives], in descending order, and their ids, int64, lowest first
        among equals.
        """
        top, ids = _largest(logits, min(num_alternatives, self.size))
        missing = (0, num_alternatives - top.shape[1])
        top, ids = F.pad(top, missing, value=float("-inf")), F.pad(ids + self.start, missing, value=self.total)
        mass = row_logsumexp(logits)
        mine = logits.gather(-1, self.local(tokens)[:, None])
        mine = mine.masked_fill(~self.holds(tokens)[:, None], float("-inf"))
        said = self.group.all_gather(torch.cat([mass.double(), mine.double(), top.double(), ids.double()], -1))
        masses, chosen, tops, every_id = said.split_with_sizes([1, 1, num_alternatives, num_alternatives], -1)
        total = row_logsumexp(masses[..., 0].T)
        # Sort by id first: the stable sort by value then keeps the lowest id first among equals, and padding last.
        merged_ids, by_id = every_id.transpose(0, 1).flatten(1).sort(-1)
        merged = tops.transpose(0, 1).flatten(1).gather(-1, by_id)
        order = merged.sort(dim=-1, descending=True, stable=True).indices[:, :num_alternatives]
        likeliest = (merged.gather(-1, order) - total).to(logits.dtype)
        return (chosen.amax(0) - total)[:, 0].to(logits.dtype), likeliest, merged_ids.gather(-1, order).long()

    def cut(self, logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, candidates: int) -> Tensor:
        """Compute each row's smallest logit that top-k, then top-p, and min-p keep; logits equal to it are kept too.

        A rank needs only this number per row to cut its own slice. It is computed from the same numbers in the same
        order, whatever the number of ranks and of candidates.

        logits: [rows, size], already divided by the temperature. top_k: [rows] int64, 0 for off. top_p, min_p: [rows]
        float64, 1 and 0 for off. candidates: number of a row's largest logits to consider: at least every top_k, and
        `total` if a row has no top_k but a top_p between 0 and 1. O(rows × candidates) traffic. Returns [rows] float64.
        """
        count = min(candidates, self.total)
        ordered, smallest, unlisted = self._candidates(logits, count)
        last = torch.where(top_k > 0, top_k, count).clamp(max=count)[:, None] - 1
        kth = ordered.gather(-1, last)
        ties = (ordered == kth).sum(-1, keepdim=True) + torch.where(smallest == kth[None], unlisted, 0).sum(0)
        ordered = ordered[:, :count]
        above = (ordered.double() - ordered[:, :1]).exp_().masked_fill_(ordered <= kth, 0)
        # Summed in order, so that candidates beyond a row's own, which add nothing, change no bit.
        up_to = above.cumsum(-1)
        before = up_to - above  # mass of all likelier tokens
        mass = up_to[:, -1:] + ties * (kth.double() - ordered[:, :1]).exp()
        nucleus = (before < top_p[:, None] * mass).sum(-1, keepdim=True).clamp(min=1) - 1
        off = torch.full_like(kth, float("-inf"))
        return torch.cat(
            [
                torch.where(top_k[:, None] > 0, kth, off),
                torch.where(top_p[:, None] < 1, ordered.gather(-1, nucleus.minimum(last)), off),
                ordered[:, :1] + min_p[:, None].log(),
            ],
            -1,
        ).amax(-1)

    def _candidates(self, logits: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Gather the largest logits of each row, at least `count`, in descending order: [rows, n].

        Returns them, and for each rank, [ranks, rows, 1] each: the smallest logit that it listed, and the number of its
        unlisted logits that equal this one.
        """
        ranks = split(self.total, self.group.size)
        if count >= ranks[-1].size:
            ordered = self.whole(logits).sort(-1, descending=True).values
            return ordered, ordered[None, :, -1:], ordered.new_zeros(1, len(ordered), 1)
        listed = logits.topk(count).values
        smallest = listed[:, -1:]
        more = (logits == smallest).sum(-1, keepdim=True) - (listed == smallest).sum(-1, keepdim=True)
        said = self.group.all_gather(torch.cat([listed, more.to(listed.dtype)], -1))
        every, unlisted = said[..., :-1], said[..., -1:]
        merged = every.transpose(0, 1).flatten(1)
        return merged.sort(-1, descending=True).values, every[..., -1:], unlisted

    def whole(self, logits: Tensor) -> Tensor:
        """Gather every rank's slice: [rows, size] to [rows, total]. For rows that need the whole vocabulary."""
        if self.group.size == 1:
            return logits
        slices = split(self.total, self.group.size)
        padded = F.pad(logits, (0, slices[0].size - self.size)).contiguous()
        gathered = self.group.all_gather(padded)
        return torch.cat([part[:, : mine.size] for part, mine in zip(gathered, slices, strict=True)], -1)


def _largest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Find the `count` largest logits of each row, in descending order, the lowest index first among equals.

    Returns values and indices, [rows, count]. topk alone does not define which of several equals it picks.
    """
    size = logits.shape[-1]
    smallest = logits.topk(max(1, count)).values[:, -1:]
    lowest_first = torch.arange(size, 0, -1, device=logits.device)
    worth = torch.where(logits > smallest, size + lowest_first, torch.where(logits == smallest, lowest_first, 0))
    index = worth.topk(count).indices.sort(-1).values
    values = logits.gather(-1, index)
    values, order = values.sort(dim=-1, descending=True, stable=True)
    return values, index.gather(-1, order)
