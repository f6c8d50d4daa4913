"""bench.gpu measures drafts of the KV policy that it is given."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bench.gpu.gpu_rounds import Bench
from engine.kv.page_choice import ChoiceView
from kernels.ragged import Ints
from kernels.reference_ops import REFERENCE
from tests.support.engines import TINY
from tests.support.rig import CPU

SHAPE = dataclasses.replace(TINY, num_heads=4, head_dim=16, hidden_size=64)


def bench(point: tuple[int, int], policy: str) -> Bench:
    return Bench(
        "tiny",
        SHAPE,
        [point],
        gamma=3,
        budget=32,
        policy=policy,
        device=CPU,
        dtype=torch.float32,
        ops=REFERENCE,
        memory=1 << 30,
        page_size=4,
        rounds=4,
    )


def test_memory_of_a_policy() -> None:
    """Bounds of the keys of each page of 4 take as much again as a quarter of the KV."""
    row_bytes = []
    for policy in ("window", "quest"):
        made = bench((1, 1500), policy)
        row_bytes.append(made._bytes(1, 1500))
        made.close()
    assert row_bytes[1] == row_bytes[0] * 5 / 4


@pytest.mark.parametrize("policy", ["verified", "quest"])
def test_drafts_read_what_the_policy_chooses(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 104 tokens and more, the budget of 32, the first 16 and the newest ones, from rows that have chosen."""
    skipped: list[int] = []
    inner = ChoiceView.skipped

    def recorded(self: ChoiceView, rows: Ints, contexts: Ints) -> Ints:
        found = inner(self, rows, contexts)
        skipped.extend(found.tolist())
        return found

    monkeypatch.setattr(ChoiceView, "skipped", recorded)
    made = bench((3, 100), policy)
    found = made.measure(3, 100, alpha=0.5, ceiling=1e9)
    made.close()
    assert found.policy == policy
    assert len(skipped) >= 3 * 3 * 4
    assert min(skipped) >= 100 - 16 - 32
