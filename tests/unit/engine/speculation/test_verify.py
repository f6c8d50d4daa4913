"""Verification accepts drafts up to the first one that the target did not choose."""

from __future__ import annotations

import torch
from hypothesis import given

from engine.speculation.verify import accept_drafts, commit_tokens
from tests.support.verdicts import DecidedRound, rounds


@given(round_=rounds())
def test_drafts_hold_up_to_the_first_disagreement(round_: DecidedRound) -> None:
    tokens, computed, row_spans = round_.copy()
    verdict = accept_drafts(tokens, computed, row_spans, round_.drafted, round_.chosen, round_.most)
    assert torch.equal(tokens, round_.tokens)
    assert torch.equal(computed, round_.computed)
    commit_tokens(tokens, computed, row_spans, verdict)
    for (slot, new, first, decided), proposed, said in zip(
        round_.row_spans.tolist(), round_.drafted.tolist(), verdict.tolist(), strict=True
    ):
        start = int(round_.computed[slot]) + new
        choices = round_.chosen[first : first + decided].tolist()
        held = 0
        while held < proposed and round_.tokens[slot, start + held] == choices[held]:
            held += 1
        assert said[:2] == [proposed, held]
        assert said[2 : 2 + decided] == choices
        assert computed[slot] == start + held
        assert tokens[slot, start : start + decided].tolist() == choices
        tokens[slot, start : start + decided] = round_.tokens[slot, start : start + decided]
        computed[slot] = round_.computed[slot]
    assert torch.equal(tokens, round_.tokens)  # no other entry changed
    assert torch.equal(computed, round_.computed)


def test_an_example() -> None:
    tokens = torch.tensor([[5, 6, 7, 8, 9, 9], [1, 2, 3, 4, 0, 0]], dtype=torch.int32)
    computed = torch.tensor([1, 0])
    # Row 0: pending 6, drafts 7, 8, 9. Row 1: a chunk of two tokens, which decides nothing.
    row_spans = torch.tensor([[0, 1, 0, 4], [1, 2, 4, 0]])
    verdict = accept_drafts(tokens, computed, row_spans, torch.tensor([3, 0]), torch.tensor([7, 8, 2, 3]), 4)
    assert verdict[0].tolist() == [3, 2, 7, 8, 2, 3]
    assert verdict[1, :2].tolist() == [0, 0]
    commit_tokens(tokens, computed, row_spans, verdict)
    assert tokens.tolist() == [[5, 6, 7, 8, 2, 3], [1, 2, 3, 4, 0, 0]]
    assert computed.tolist() == [4, 2]
