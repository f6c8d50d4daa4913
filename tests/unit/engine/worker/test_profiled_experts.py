"""The start-up profile uses the experts of a model as evenly as text of all kinds would."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels import reference_experts
from models.model_config import ExpertsConfig
from tests.support.engines import TINY, tiny_engine, tiny_model

SHAPE = replace(TINY, vocab_size=512, experts=ExpertsConfig(count=16, per_token=2, size=8))


@pytest.mark.parametrize("gamma", [0, 3])
def test_measured_rows_choose_many_experts(monkeypatch: pytest.MonkeyPatch, gamma: int) -> None:
    """Of 16 experts, 8 tokens that choose 2 at random each have 10.5 on average; 8 equal tokens have 2."""
    used: list[tuple[int, int]] = []
    choose = reference_experts.choose_experts

    def recorded(scores: Tensor, per_token: int, normalised: bool) -> tuple[Tensor, Tensor]:
        chosen, weights = choose(scores, per_token, normalised)
        used.append((len(scores), int((torch.bincount(chosen.flatten()) > 0).sum())))
        return chosen, weights

    monkeypatch.setattr(reference_experts, "choose_experts", recorded)
    engine = tiny_engine(tiny_model(dtype=torch.float32, config=SHAPE), gamma=gamma)
    engine.profiler.measure(8, 40, gamma)
    assert len(used) >= 3 * 2 * (1 + gamma)  # layers of rounds
    for tokens, distinct in used:
        assert tokens >= 8
        assert distinct >= 6
