"""Whole models over rows that share pages, on GPU kernels: eager and captured forwards, against the reference."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.batch.forward_graphs import ForwardGraphs
from engine.batch.round_batch import RoundBatch
from engine.batch.row_state import RowState
from engine.batch.runner import Runner
from engine.batch.view import DenseView, View
from engine.kv.window import WindowView
from engine.params import SamplingParams
from engine.plan import PageDelta, RoundPlan, RowStart, RowWork
from kernels.ops import Ops
from kernels.reference_ops import REFERENCE
from models.config import ModelConfig
from models.loader import random_model
from parallel.group import Group
from tests.support import fake_flashinfer
from tests.support.engines import TINY
from tests.support.profiles import is_all, only_in_all
from tests.support.rig import CPU
from tests.support.shared_batches import always_share

pytest.importorskip("triton", reason="Triton is not installed: there are no builds for this platform")

from kernels.flashinfer.attention_by_window import AttentionByWindow
from kernels.flashinfer.flashinfer_workspace import Workspace
from kernels.gpu import INTERPRETED
from kernels.gpu.gpu_ops import GpuOps

if not INTERPRETED:
    pytest.skip("tests/gpu has these on a GPU", allow_module_level=True)

from tests.support.recorded import Recorded

PAGE, ROWS, LENGTH = 4, 6, 80
SMALL = dataclasses.replace(TINY, num_layers=1, num_heads=3 if is_all() else 1, num_kv_heads=1)
"""The interpreter is slow."""
SYSTEM, DOCUMENT = [0, 1], [2, 3, 4]
SHARED = [SYSTEM + DOCUMENT, SYSTEM + DOCUMENT, SYSTEM, SYSTEM, SYSTEM + DOCUMENT, []]
"""Pages that each row shares: rows 0, 1 and 4 a document, 2 and 3 only what all but row 5 begin with."""


class Rows:
    """Rows with the same first tokens on the same pages, on one implementation of kernels. Their tokens are given."""

    def __init__(
        self, ops: Ops, config: ModelConfig, dtype: torch.dtype, captured: bool, make_view: Callable[[Tensor], View]
    ) -> None:
        model = random_model(config, 0, dtype, CPU, Group.single(), ops)
        self.state = RowState(max_rows=ROWS, max_model_len=LENGTH, page_size=PAGE, device=CPU, ops=ops)
        self.runner = Runner(
            model, model.make_pool(160, PAGE), ops.attention(PAGE, model.head_dim), make_view(self.state.page_table)
        )
        if captured and ops.make_graphs is not None:
            graphs = ForwardGraphs(
                model, self.runner.pool, ops.make_graphs(), rows=[1, 4], queries=[3], width=20, shares=True
            )
            self.runner = dataclasses.replace(self.runner, graphs=graphs)
        self.computed = np.zeros(ROWS, dtype=np.int64)

    def run(self, work: dict[int, tuple[int, int]], plan: RoundPlan | None = None) -> torch.Tensor:
        """Compute rows: new tokens and drafts of each. Returns the logits of its samples."""
        plan = plan or RoundPlan(0, [], [], [])
        order = sorted(work, key=lambda row: -work[row][1])
        plan.work = [RowWork(row, int(self.computed[row]), *work[row], True) for row in order]
        self.state.apply(plan)
        batch = RoundBatch(self.state, plan)
        logits = self.runner.forward(batch.verify_inputs(self.runner.view))
        for row in order:
            self.computed[row] += sum(work[row])
            self.state.computed[row] += sum(work[row])
        return logits

    def everything(self) -> list[torch.Tensor]:
        """Rows 0, 2 and 5 compute their prompts, which the others then find; then rounds of various shapes."""
        torch.manual_seed(0)
        texts = torch.randint(2, 60, (ROWS, LENGTH))
        found = []
        for row in (0, 2, 5, 1, 3, 4):
            shared = SHARED[row]
            owner = 0 if shared else row
            first = 0 if row in (0, 5) else (len(SYSTEM) if row == 2 else len(shared)) * PAGE
            texts[row, : len(shared) * PAGE] = texts[owner, : len(shared) * PAGE]
            own = [10 + 20 * row + i for i in range(LENGTH // PAGE - len(shared))]
            start = RowStart(row, texts[row].tolist(), LENGTH, SamplingParams(), [], first)
            self.computed[row] = first
            plan = RoundPlan(0, [start], [PageDelta(row, 0, shared + own)], [])
            found.append(self.run({row: (20 + row - first + (first == 20), 0)}, plan))
        for shape in ROUNDS:
            found.append(self.run(shape))
        return found


ROUNDS: Sequence[dict[int, tuple[int, int]]] = [
    {0: (1, 2), 1: (1, 0), 2: (1, 1), 3: (1, 2)},  # the document, and what all begin with; padding in front
    {0: (1, 2), 4: (1, 1), 5: (1, 0)},  # a row without prefix, and one that is missing
    {0: (1, 0), 5: (1, 0)},  # nothing is shared
    {1: (7, 0), 0: (1, 2), 3: (1, 2), 2: (1, 0)},  # beside a chunk: launched kernel by kernel
]


@pytest.fixture(scope="module")
def dense() -> tuple[Recorded, list[Tensor], list[bool]]:
    """Run all rows with captures. Returns what made these, the logits, and whether each replay was one of rows that
    share."""
    recorded, replayed = Recorded(), list[bool]()
    with pytest.MonkeyPatch.context() as patch:
        always_share(patch)
        ours = Rows(GpuOps(make_recorder=lambda: recorded), SMALL, torch.float32, True, DenseView)
        graphs = ours.runner.graphs
        assert graphs is not None
        for shape, forward in list(graphs._captured.items()):

            def replay(again: object = forward.replay, shares: bool = shape.shares) -> None:
                replayed.append(shares)
                assert callable(again)
                again()

            graphs._captured[shape] = dataclasses.replace(forward, replay=replay)
        return recorded, ours.everything(), replayed


WINDOW = partial(WindowView, budget=12, sink=4, page_size=PAGE)


# Rounds with captures have some launched kernel by kernel too.
@pytest.mark.parametrize(
    ("captured", "make_view"),
    [
        pytest.param(True, DenseView, id="captured-dense"),
        pytest.param(False, WINDOW, id="eager-window"),
        only_in_all(False, DenseView, id="eager-dense"),
        only_in_all(True, WINDOW, id="captured-window"),
    ],
)
def test_triton(
    monkeypatch: pytest.MonkeyPatch,
    captured: bool,
    make_view: Callable[[Tensor], View],
    dense: tuple[Recorded, list[Tensor], list[bool]],
) -> None:
    always_share(monkeypatch)
    recorded = Recorded()
    expected = Rows(REFERENCE, SMALL, torch.float32, False, make_view).everything()
    if captured and make_view is DenseView:
        recorded, found, _ = dense
    else:
        ops = GpuOps(make_recorder=lambda: recorded)
        found = Rows(ops, SMALL, torch.float32, captured, make_view).everything()
    for logits, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
        assert torch.equal(logits.argmax(-1), wanted.argmax(-1))
    assert recorded.captured == (3 if captured else 0)  # two shapes, one of them of more than one row


def test_flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager: the fake cannot be captured. Some results differ in the last bits of 16."""
    always_share(monkeypatch)
    monkeypatch.setitem(sys.modules, "flashinfer", fake_flashinfer)
    config = dataclasses.replace(SMALL, head_dim=64)
    expected = Rows(REFERENCE, config, torch.float16, False, DenseView).everything()
    ours = Rows(GpuOps(Workspace(CPU, (9, 0), multiprocessors=132)), config, torch.float16, False, DenseView)
    for logits, wanted in zip(ours.everything(), expected, strict=True):
        assert (logits - wanted).norm() < 0.01 * wanted.norm()
    assert isinstance(ours.runner.attention, AttentionByWindow)
    assert ours.runner.attention.without._prefixes is not None


def test_forwards_that_share_nothing_replay_the_ordinary_capture(
    dense: tuple[Recorded, list[Tensor], list[bool]],
) -> None:
    """So it costs nothing that another exists. Where sharing cannot pay, none exists."""
    never = Recorded()
    Rows(GpuOps(make_recorder=lambda: never), SMALL, torch.float32, True, DenseView)
    assert never.captured == 2
    assert dense[2][-3:] == [True, True, False]
