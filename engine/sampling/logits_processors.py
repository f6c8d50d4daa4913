"""Logits processors: changes to logits, requested per row, that precede the sampling rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.plan import RowStart
from kernels.transfer import send
from parallel.vocab_shard import VocabShard


@dataclass(frozen=True, slots=True)
class BadWords:
    """Sequences of tokens whose last token is excluded after the others; all are compared at once.

    begins: [words, longest - 1] int32, each word's tokens before its last one, aligned at the end. is_token: the same
    shape, bool, False for padding. lengths: [words], number of tokens before the last one. last: [words], index into
    the slice of logits.
    """

    begins: Tensor
    is_token: Tensor
    lengths: Tensor
    last: Tensor

    @classmethod
    def from_words(cls, words: Sequence[Sequence[int]], first: int, device: torch.device) -> BadWords:
        """first: the slice's first token."""
        longest = max(map(len, words)) - 1
        padded = [[-1] * (longest + 1 - len(word)) + list(word[:-1]) for word in words]
        begins = torch.tensor(padded, dtype=torch.int32).view(len(words), longest)
        lengths = torch.tensor([len(word) - 1 for word in words])
        last = torch.tensor([word[-1] - first for word in words])
        return cls(*(send(part, device) for part in (begins, begins >= 0, lengths, last)))

    def apply(self, logits: Tensor, position: Tensor, row: Tensor) -> None:
        """See LogitEdits.apply."""
        before = torch.arange(-self.begins.shape[1], 0, device=row.device) + position
        differs = (row[before.clamp_(min=0)] != self.begins) & self.is_token
        matches = ~differs.any(1) & (position >= self.lengths)
        logits.index_add_(0, self.last, torch.where(matches, float("-inf"), 0.0).to(logits.dtype))


@dataclass(frozen=True, slots=True)
class LogitEdits:
    """One row's edits of single logits: bias, stop tokens forbidden before `min_length`, excluded tokens and words.

    tokens: [m] index into this rank's slice. bias: [m]. forbidden: [m] 0 or -inf, added while the row is shorter than
    `min_length`. excluded: [slice] bool, or None. words: the bad words that end in this rank's slice, or None.
    """

    tokens: Tensor
    bias: Tensor
    forbidden: Tensor
    min_length: int
    excluded: Tensor | None
    words: BadWords | None

    @classmethod
    def from_row_start(cls, start: RowStart, vocab: VocabShard, device: torch.device) -> LogitEdits:
        params = start.params
        stops = start.stop_ids if params.min_tokens else []
        ids = torch.tensor([*params.logit_bias, *stops], dtype=torch.int64)
        bias = torch.tensor([*params.logit_bias.values(), *(0.0 for _ in stops)], dtype=torch.float64)
        forbidden = torch.zeros_like(bias)
        forbidden[len(params.logit_bias) :] = float("-inf")
        mine = vocab.holds(ids)
        tokens = vocab.local(ids)[mine]
        min_length = start.num_prompt + params.min_tokens
        excluded = None
        if params.allowed_token_ids:
            allowed = torch.tensor(params.allowed_token_ids, dtype=torch.int64)
            excluded = torch.ones(vocab.size, dtype=torch.bool)
            excluded[vocab.local(allowed)[vocab.holds(allowed)]] = False
            excluded = send(excluded, device)
        mine_last = range(vocab.start, vocab.start + vocab.size)
        ending = [word for word in params.bad_words if word[-1] in mine_last]
        words = BadWords.from_words(ending, vocab.start, device) if ending else None
        tokens, bias, forbidden = (send(part, device) for part in (tokens, bias[mine], forbidden[mine]))
        return cls(tokens, bias, forbidden, min_length, excluded, words)

    def apply(self, logits: Tensor, position: Tensor, row: Tensor) -> None:
        """Edit one row of logits in place. position: [] int64, of the token being sampled. row: [max_model_len], the
        row's tokens, drafts included."""
        change = self.bias + torch.where(position < self.min_length, self.forbidden, 0.0)
        logits.index_add_(0, self.tokens, change.to(logits.dtype))
        if self.excluded is not None:
            logits.masked_fill_(self.excluded, float("-inf"))
        if self.words is not None:
            self.words.apply(logits, position, row)


class TokenCounts:
    """Occurrences of each token of this rank's slice in the rows that have penalties.

    output: [max_rows, slice] int32. in_prompt: [max_rows, slice] bool. Other rows hold stale values.
    """

    def __init__(self, max_rows: int, vocab: VocabShard, device: torch.device) -> None:
        self._vocab = vocab
        self.output = torch.zeros(max_rows, vocab.size, dtype=torch.int32, device=device)
        self.in_prompt = torch.zeros(max_rows, vocab.size, dtype=torch.bool, device=device)

    def start(self, row: int, prompt: list[int], output: list[int]) -> None:
        for counts, tokens in ((self.in_prompt, prompt), (self.output, output)):
            ids = torch.tensor(tokens, dtype=torch.int64)
            counted = torch.bincount(self._vocab.local(ids)[self._vocab.holds(ids)], minlength=self._vocab.size)
            counts[row] = send(counted.to(counts.dtype), counts.device)

    def add(self, rows: Tensor, tokens: Tensor, committed: Tensor) -> None:
        counted = (committed & self._vocab.holds(tokens)).to(torch.int32)
        self.output.index_put_((rows, self._vocab.local(tokens)), counted, accumulate=True)

    def output_with(self, rows: Tensor, drafted: Tensor, counted: Tensor) -> Tensor:
        """Return copies of the output counts of `rows` [n], with drafted [n, m] tokens added where counted [n, m]."""
        counts = self.output[rows]
        weights = (counted & self._vocab.holds(drafted)).to(torch.int32)
        return counts.scatter_add_(1, self._vocab.local(drafted), weights)
