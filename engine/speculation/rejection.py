"""Verification by speculative sampling (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318).

The other rule is coupled sampling, the default (engine.speculation.verify). Here a sampled token is distributed as the
target's, but the text depends on the drafts. Greedy rows involve no randomness and are verified as always.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from engine.batch.round_batch import SamplePositions
from engine.batch.row_state import RowState
from engine.sampling.grammar import Grammars
from engine.sampling.sampler import Sampler, mark_failures
from kernels.noise import gumbel_noise
from kernels.ops import Ops
from kernels.ragged import Ints
from kernels.reference_ops import REFERENCE
from parallel.vocab_shard import VocabShard

_KEEP, _RESIDUAL = 0x5A6F9E2D3B1C7F01, 0x2F8D1C6B7A4E9035
"""Streams of noise besides the draft's own: a token, the choice to keep it, and its replacement are independent."""


def keep_or_replace(p: Tensor, q: Tensor, drafts: Tensor, keep: Tensor, noise: Tensor, vocab: VocabShard) -> Tensor:
    """Keep draft d with probability min(1, p(d) / q(d)); else sample from max(p - q, 0), normalised.

    p, q: [n, slice], log-probabilities of target and draft. drafts: [n] int64. keep: [n], logarithms of uniform
    numbers. noise: [n, slice], Gumbel. Returns [n] int64, distributed as p.
    """
    kept = keep < vocab.at_tokens(p, drafts) - vocab.at_tokens(q, drafts)
    residual = torch.log((p.exp() - q.exp()).clamp_(min=0)) + noise
    replacement = vocab.argmax(residual)
    # Where p exceeds q nowhere, except by rounding, there is nothing to replace the draft with.
    kept |= vocab.at_tokens(residual, replacement) == float("-inf")
    return torch.where(kept, drafts, replacement)


class Proposals:
    """Log-probabilities that this round's drafts were sampled from: of this rank's slice, by row and step."""

    def __init__(self, max_rows: int, gamma_max: int) -> None:
        self._place = np.full((max_rows, gamma_max), -1, dtype=np.int64)
        self._logprobs: list[Tensor] = []
        self._count = 0

    def add(self, samples: SamplePositions, index: np.ndarray, logprobs: Tensor) -> None:
        """logprobs: [n, slice], of the samples `index` [n] of a draft step."""
        self._place[samples.rows[index], samples.drafted[index]] = self._count + np.arange(len(index))
        self._logprobs.append(logprobs)
        self._count += len(index)

    def clear(self) -> None:
        self._place.fill(-1)
        self._logprobs, self._count = [], 0

    def take(self, samples: SamplePositions) -> tuple[np.ndarray, np.ndarray, Tensor] | None:
        """Find the proposals of these samples, and clear all.

        Returns the samples that have one [m], the place of each in the last item [m], and all proposals [k, slice].
        """
        if not self._logprobs:
            return None
        drafted = np.minimum(samples.drafted, self._place.shape[1] - 1)
        place = np.where(samples.drafted < self._place.shape[1], self._place[samples.rows, drafted], -1)
        logprobs = torch.cat(self._logprobs)
        self.clear()
        found = np.flatnonzero(place >= 0)
        return found, place[found], logprobs


class RejectionSampler(Sampler):
    """Sampler of a target, or of its draft; both share their proposals."""

    def __init__(
        self,
        state: RowState,
        vocab: VocabShard,
        proposals: Proposals,
        ops: Ops = REFERENCE,
        grammars: Grammars | None = None,
    ) -> None:
        super().__init__(state, vocab, ops, grammars)
        self._proposals = proposals

    def for_draft(self, vocab: VocabShard) -> Sampler:
        return RejectionSampler(self._state, vocab, self._proposals, self._ops, self._grammars)

    def abandon_round(self) -> None:
        self._proposals.clear()

    def draft(self, logits: Tensor, samples: SamplePositions) -> Tensor:
        temperature = self._process(logits, samples, divide=True)
        random = np.flatnonzero(self._random[samples.rows])
        if len(random):
            self._proposals.add(samples, random, self._vocab.normalised(logits[self._to_device(random)]))
        return self._sample_at(logits, temperature, samples)[1]

    def is_plain(self, rows: Ints) -> bool:
        """See Sampler.is_plain. Sampled rows are not: their proposals have to be kept."""
        return not self._random[rows].any() and super().is_plain(rows)

    def choose(self, logits: Tensor, samples: SamplePositions) -> Tensor:
        """See Sampler.choose. Where a draft was sampled, the choice is to keep it or its replacement."""
        taken = self._proposals.take(samples)
        if taken is None:
            return super().choose(logits, samples)
        found, place, proposals = taken
        temperature = self._process(logits, samples, divide=True)
        index = self._to_device(found)
        p, q = self._vocab.normalised(logits[index]), proposals[self._to_device(place)]
        slots, position = samples.row_index[index], samples.position[index]
        drafts = self._state.tokens[slots, position].long()
        # exp(-exp(-G)) of Gumbel noise G is uniform; this is its logarithm.
        keep = -torch.exp(-gumbel_noise(self._seed[slots] ^ _KEEP, position, 0, 1)[:, 0])
        noise = self._noise(samples, index, _RESIDUAL)
        values, chosen = self._sample_at(logits, temperature, samples)
        # A draft whose logits were not finite was not drawn from any distribution; the target's own sample stands.
        valid = ~self._vocab.at_tokens(q, drafts).isnan()
        chosen[index] = torch.where(valid, keep_or_replace(p, q, drafts, keep, noise, self._vocab), chosen[index])
        return mark_failures(values, chosen)
