"""The cache of SnapKV holds what the pool it copies from holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from engine.batch.round_batch import RoundBatch
from engine.kv.snapkv import SnapKVPolicy
from engine.messages import AddRequest
from engine.params import SamplingParams
from kernels.ragged import Ints
from tests.support.engines import Scripted, run, tiny_engine, tiny_model
from tests.support.profiles import is_all, only_in_all
from tests.support.ranks import DRAFT, write_random_model
from tests.support.workloads import prompt_of


@pytest.mark.parametrize(
    ("pause", "batch"), [(1, 64), (12, 9), *(only_in_all(*each) for each in ((0, 64), (2, 64), (24, 9)))]
)
def test_a_draft_cache_that_holds_everything_is_a_copy(tmp_path: Path, pause: int, batch: int) -> None:
    """Also after rejected drafts in whose place other tokens have been committed without drafts, and where the draft
    model computes what it lacks in several rounds."""
    draft = write_random_model(tmp_path / "draft", DRAFT, seed=3)
    engine = tiny_engine(
        tiny_model(),
        gamma=4,
        page_size=4,
        max_model_len=200,
        scheduler={"max_batch_tokens": batch},
        speculation={
            "drafter": "model",
            "model": str(draft),
            "kv": {"policy": "snapkv", "budget": 256, "recent": 64, "queries": 4},
        },
    )
    engine._scheduler.controller = Scripted([*[4] * (6 if pause > 2 else 1), *[0] * pause] * 100)
    checked = []
    prepare = SnapKVPolicy.prepare

    def compared(policy: SnapKVPolicy, batch: RoundBatch, end: Ints) -> None:
        prepare(policy, batch, end)
        for row, stop in zip(batch.row[: batch.num_drafting].tolist(), end.tolist(), strict=True):
            full, cache, offset = policy._locate(np.full(stop, row), np.arange(stop))
            checked.append(torch.equal(policy.full.read_tokens(full, offset), policy.pool.read_tokens(cache, offset)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SnapKVPolicy, "prepare", compared)
        params = SamplingParams(max_tokens=120 if is_all() else 80, temperature=1.0, ignore_eos=True)
        run(engine, [AddRequest("0", prompt_of(38, 0), params)])
    assert engine.stats().rejections > 5
    assert len(checked) > 10
    assert all(checked)
