"""Rounds with known drafts and choices, for tests of acceptance and commit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor


@dataclass(frozen=True, slots=True)
class DecidedRound:
    """Arguments of engine.speculation.verify.accept_drafts."""

    tokens: Tensor
    computed: Tensor
    row_spans: Tensor
    drafted: Tensor
    chosen: Tensor

    @property
    def most(self) -> int:
        return int(self.row_spans[:, 3].max())

    def copy(self) -> tuple[Tensor, Tensor, Tensor]:
        """Copies of tokens, computed and row_spans."""
        return self.tokens.clone(), self.computed.clone(), self.row_spans.clone()


@st.composite
def rounds(draw: st.DrawFn) -> DecidedRound:
    """Draw rounds of up to five rows. Some rows decide nothing; some fill their token list to the end."""
    slots = draw(st.lists(st.integers(0, 6), min_size=1, max_size=5, unique=True))
    computed, row_spans, drafted = torch.randint(9, (7,)), [], []
    first = 0
    for slot in slots:
        decided = draw(st.integers(0, 7))
        new = draw(st.integers(1, 3))
        computed[slot] = draw(st.one_of(st.integers(0, 9), st.just(32 - new - decided)))
        row_spans.append([slot, new, first, decided])
        drafted.append(draw(st.integers(0, max(0, decided - 1))))
        first += decided
    torch.manual_seed(draw(st.integers(0, 1000)))
    tokens = torch.randint(3, (7, 32), dtype=torch.int32)  # so few values that drafts are often accepted
    return DecidedRound(tokens, computed, torch.tensor(row_spans), torch.tensor(drafted), torch.randint(3, (first,)))
