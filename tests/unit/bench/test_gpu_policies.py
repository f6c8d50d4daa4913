"""bench.gpu measures drafts of the KV policy that it is given."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bench.gpu.gpu_rounds import Bench
from engine.kv.page_choice import ChoiceView
from kernels.ragged import Ints
from kernels.reference_ops import REFERENCE
from models.model_config import ModelConfig
from tests.support.engines import TINY
from tests.support.rig import CPU

SHAPE = dataclasses.replace(TINY, num_heads=4, head_dim=16, hidden_size=64)


TOKEN_BYTES = 2 * 2 * 16 * 4
"""Bytes of the KV of one token in a layer."""


def bench(point: tuple[int, int], policy: str, shape: ModelConfig = SHAPE) -> Bench:
    return Bench(
        "tiny",
        shape,
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


@pytest.mark.parametrize(
    ("layers", "policy", "read"),
    [((0, 1), "window", 2 * 40), ((0, 1), "quest", 2 * 40), ((1,), "window", 100 + 40), ((1,), "quest", 100 + 40)],
)
def test_sliding_layers_read_their_window(layers: tuple[int, ...], policy: str, read: int) -> None:
    """Each row that of its own. Pools take what was counted for them, and bounds of keys a quarter of the first."""
    made = bench((3, 100), policy, dataclasses.replace(SHAPE, sliding_window=40, sliding_layers=layers))
    target = made._engine._worker._target
    bounds = target.pool.nbytes // 4 if policy == "quest" else 0
    sliding_bytes = target.sliding.pool.nbytes if target.sliding else 0
    assert made._bytes(3, 100) == target.pool.nbytes + bounds + sliding_bytes
    found = made.measure(3, 100, alpha=0.5, ceiling=1e9)
    assert found.floor_ms == pytest.approx(1e3 * (made.weight_bytes + 3 * read * TOKEN_BYTES) / 1e9)
    if target.sliding:
        table = made._engine._worker._state.sliding_table[:3, : made._width(100)]
        first, last = (100 - 40) // 4, 100 // 4
        assert len(set(table[:, first : last + 1].flatten().tolist())) == 3 * (last + 1 - first)
        assert table.max() < made._engine.profiler.sliding_pages
    made.close()


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
