"""Verification by speculative sampling (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318).

A drafted token d is kept with probability min(1, p(d) / q(d)), p being what the target samples from and q what the
draft sampled from; else the position gets a sample of max(p - q, 0), normalised. Either way it is distributed as p.
Which text comes out depends on what was drafted, though: coupled sampling, the default, has no such trace. Greedy rows
have nothing to reject at random, and are verified as always.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from engine.batch.rows import Decisions, Ints, Rows
from engine.sampling.grammar import Grammars
from engine.sampling.sampler import Sampler
from kernels.noise import gumbel_noise
from kernels.ops import Ops
from kernels.reference import REFERENCE
from parallel.sampling import VocabShard

_KEEP, _RESIDUAL = 0x5A6F9E2D3B1C7F01, 0x2F8D1C6B7A4E9035
"""Streams of noise beside the draft's own: a token, the choice to keep it, and what replaces it are independent."""


class Proposals:
    """What drafts were sampled from in this round: log-probabilities of this rank's slice, by row and step."""

    def __init__(self, max_rows: int, gamma_max: int) -> None:
        self._place = np.full((max_rows, gamma_max), -1, dtype=np.int64)
        self._held: list[Tensor] = []
        self._count = 0

    def add(self, decisions: Decisions, index: np.ndarray, logprobs: Tensor) -> None:
        """logprobs: [n, slice], of decisions `index` [n] of a draft step."""
        self._place[decisions.rows[index], decisions.drafted[index]] = self._count + np.arange(len(index))
        self._held.append(logprobs)
        self._count += len(index)

    def clear(self) -> None:
        """Nothing is proposed."""
        self._place.fill(-1)
        self._held, self._count = [], 0

    def take(self, decisions: Decisions) -> tuple[np.ndarray, np.ndarray, Tensor] | None:
        """Which of the decisions [m] have a proposal, where it stands in the last item, and all proposals: [k, slice].
        Forgets them."""
        if not self._held:
            return None
        drafted = np.minimum(decisions.drafted, self._place.shape[1] - 1)
        place = np.where(decisions.drafted < self._place.shape[1], self._place[decisions.rows, drafted], -1)
        held = torch.cat(self._held)
        self.clear()
        found = np.flatnonzero(place >= 0)
        return found, place[found], held


class RejectionSampler(Sampler):
    """The sampler of a target, or of its draft, that share their proposals."""

    def __init__(
        self,
        rows: Rows,
        vocab: VocabShard,
        proposals: Proposals,
        ops: Ops = REFERENCE,
        grammars: Grammars | None = None,
    ) -> None:
        super().__init__(rows, vocab, ops, grammars)
        self._proposals = proposals

    def twin(self, vocab: VocabShard) -> Sampler:
        return RejectionSampler(self._rows, vocab, self._proposals, self._ops, self._grammars)

    def give_up(self) -> None:
        self._proposals.clear()

    def draft(self, logits: Tensor, decisions: Decisions) -> Tensor:
        temperature = self._adjust(logits, decisions, divide=True)
        sampled = np.flatnonzero(self._sampled[decisions.rows])
        if len(sampled):
            self._proposals.add(decisions, sampled, self._vocab.normalised(logits[self._to_device(sampled)]))
        return self._decide(logits, temperature, decisions)

    def by_rule(self, rows: Ints) -> bool:
        """Proposals have to be kept."""
        return not self._sampled[rows].any() and super().by_rule(rows)

    def choose(self, logits: Tensor, decisions: Decisions) -> Tensor:
        """See Sampler.choose. Where a draft was sampled, the choice is to keep it or what replaces it."""
        taken = self._proposals.take(decisions)
        if taken is None:
            return super().choose(logits, decisions)
        found, place, proposals = taken
        temperature = self._adjust(logits, decisions, divide=True)
        judged = self._to_device(found)
        p = self._vocab.normalised(logits[judged])
        q = proposals[self._to_device(place)]
        slots, position = decisions.row_index[judged], decisions.position[judged]
        drafts = self._rows.tokens[slots, position].long()
        # u = exp(-exp(-G)) is uniform; u < p(d) / q(d) is compared by logarithms.
        keep = -torch.exp(-gumbel_noise(self._seed[slots] ^ _KEEP, position, 0, 1)[:, 0])
        kept = keep < self._vocab.of(p, drafts) - self._vocab.of(q, drafts)
        residual = torch.log((p.exp() - q.exp()).clamp_(min=0)) + self._noise(decisions, judged, _RESIDUAL)
        # Where p is nowhere above q but for rounding, nothing is left to replace a draft with.
        replaced = self._vocab.argmax(residual)
        kept |= self._vocab.of(residual, replaced) == float("-inf")
        chosen = self._decide(logits, temperature, decisions)
        chosen[judged] = torch.where(kept, drafts, replaced)
        return chosen
