"""A round's inputs reach the device without a wait: through kernels.transfer, which pins them. Nothing is read back.

On the device "meta", which has shapes but no values, reading one is an error.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from engine.batch.graph_inputs import GraphInputs
from engine.batch.round_batch import RoundBatch
from engine.batch.row_state import RowState
from engine.batch.view import DenseView
from engine.kv.window import WindowView
from engine.params import SamplingParams
from engine.plan import PageDelta, RoundPlan, RowStart, RowWork
from engine.sampling.sampler import Sampler
from kernels.attention.base import AttentionBatch
from kernels.attention.relative import RelativeAttention
from kernels.kv.kv_pool import KVPool, LayerKV
from kernels.reference_ops import ReferenceOps
from parallel.group import Group
from parallel.vocab_shard import VocabShard

DEVICE, PAGE = torch.device("meta"), 4


class Copies(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the places of copies to the device that do not go through kernels.transfer."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.through, self.others = 0, list[str]()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if "copy" in str(func):
            given = {part.device.type for part in tree_flatten((args, kwargs))[0] if isinstance(part, Tensor)}
            if "cpu" in given and isinstance(result, Tensor) and result.device == DEVICE:
                frames = [frame for frame in traceback.extract_stack()[:-1] if "site-packages" not in frame.filename]
                if frames[-1].filename.endswith("kernels/transfer.py"):
                    self.through += 1
                else:
                    self.others.append(f"{frames[-1].filename}:{frames[-1].lineno}")
        return result


class Kernels(ReferenceOps):
    """A GPU's kernels sample in one launch; the reference asks which rows are sampled."""

    def sample(
        self, logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor, first: int
    ) -> tuple[Tensor, Tensor]:
        return logits[:, 0], seeds


class Planned:
    def plan(self, batch: AttentionBatch) -> None:
        pass

    def run(self, layer: LayerKV, q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        raise AssertionError


def plan() -> RoundPlan:
    """Start three rows with all options there are; two of them draft, a third computes a chunk of its prompt."""
    params = SamplingParams(
        temperature=1.0,
        top_p=0.5,
        frequency_penalty=0.5,
        min_tokens=9,
        logit_bias={3: 1.0},
        allowed_token_ids=(3, 4, 5),
        bad_words=((1, 2), (5,)),
    )
    starts = [RowStart(row, [2] * 12, 11, params, [0], 0 if row == 2 else 11) for row in range(3)]
    work = [RowWork(0, 11, 1, 3, True), RowWork(1, 11, 1, 2, True), RowWork(2, 0, 8, 0, False)]
    return RoundPlan(0, starts, [PageDelta(row, 0, [4 * row + i for i in range(4)]) for row in range(3)], work)


def test_rounds_copy_without_waiting() -> None:
    with Copies() as copies:
        state = RowState(max_rows=4, max_model_len=64, page_size=PAGE, device=DEVICE)
        sampler = Sampler(state, VocabShard(0, 64, 64, Group.single()), Kernels())
        sizes = {"num_layers": 1, "num_pages": 12, "kv_heads": 1, "head_dim": 4}
        pool = KVPool(**sizes, page_size=PAGE, dtype=torch.float32, device=DEVICE, scratch=True)
        captured = GraphInputs(pool, rows=8, queries=4, width=16)
        copies.others.clear()
        for start in plan().starts:
            sampler.start(start)
        state.apply(plan())
        batch = RoundBatch(state, plan())
        window = WindowView(state.page_table, budget=8, sink=4, page_size=PAGE)
        captured.copy(batch.draft_inputs(0, window, np.array([1, 0])), np.arange(2))
        step, row = batch.drafts(range(1, 3))
        captured.copy(batch.later_draft_inputs(3, window), (step - 1) * 4 + row)
        batch.place_drafts(batch.draft_samples(range(3)), torch.zeros(5, dtype=torch.int64, device=DEVICE))
        batch.read_drafts()
        batch.verify_inputs(DenseView(state.page_table))
        sampler.draft(torch.zeros(8, 64, device=DEVICE), batch.samples)
        tables = torch.zeros(2, 64, 2, device=DEVICE)
        relative = RelativeAttention(Planned(), Planned(), page_size=PAGE, sink_pages=1, rotary=(tables[0], tables[1]))
        relative.plan(batch.draft_inputs(0, window).attention)
    assert copies.through > 10
    assert copies.others == []
