"""Models on the Triton kernels: logits, and unchanged output under speculation. tests/unit/kernels/test_gpu_kernels.py
describes where these run."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.batch.forward_graphs import graph_row_counts
from engine.core import Engine
from engine.messages import AddRequest, RequestOutput
from engine.params import SamplingParams
from kernels.attention.base import AttentionBatch, GraphBatch
from kernels.attention.reference_attention import ReferenceAttention
from kernels.ops import Ops
from kernels.reference_ops import REFERENCE
from models.config import ModelConfig
from models.decoder import DecoderModel
from models.loader import random_model
from parallel.group import Group
from parallel.matrix_layer import WeightChoice
from tests.support import fake_flashinfer
from tests.support.engines import TINY, Scripted, run, tiny_engine, tokens
from tests.support.profiles import is_all, only_in_all
from tests.support.ranks import write_random_model
from tests.support.rig import PagedRows, pool_layer

pytest.importorskip("triton", reason="Triton is not installed: there are no builds for this platform")

from kernels.attention.triton_attention import GpuAttention, GpuGraphAttention
from kernels.flashinfer.flashinfer_attention import FlashInferAttention
from kernels.flashinfer.flashinfer_graph import FlashInferGraphAttention
from kernels.flashinfer.flashinfer_workspace import Workspace
from kernels.gpu import INTERPRETED
from kernels.gpu.gpu_ops import GpuOps

if not INTERPRETED:
    pytest.skip("tests/gpu has these on a GPU", allow_module_level=True)

from tests.support.recorded import Recorded

VARIANTS = {
    "plain": TINY,
    "biases": dataclasses.replace(TINY, qkv_bias=True, o_bias=True, mlp_bias=True),
    "qk_norm": dataclasses.replace(TINY, qk_norm="head"),
}
ONE_HEAD = dataclasses.replace(TINY, num_heads=3 if is_all() else 1, num_kv_heads=1)
ONE_LAYER = dataclasses.replace(ONE_HEAD, num_layers=1)
"""Models where only captures are tested: the interpreter takes its time for every head and layer. The tests above these
captures have several of both, and so have those of kernels."""
TEXT = [2 + 7 * i % 60 for i in range(14)]
NEW_TOKENS = 10 if is_all() else 6


def logits(config: ModelConfig, ops: Ops, weights: str) -> torch.Tensor:
    """Logits of a text in a chunk and single tokens, next to another row."""
    model = random_model(config, 1, torch.float32, torch.device("cpu"), Group.single(), ops, WeightChoice(weights))
    rows = PagedRows(model, [16, 16], page_size=4)
    parts = []
    for first, last in ((0, 12), (12, 13), (13, 14)) if is_all() else ((0, 6), (6, 7)):
        parts.append(rows.forward({0: TEXT[first:last], 1: TEXT[::-1][first:last]}, {0: range(last - first)}))
    return torch.cat(parts)


@pytest.mark.parametrize(
    ("variant", "weights"),
    [("plain", "dense"), only_in_all("biases", "dense"), ("biases", "int4"), ("qk_norm", "int8"), ("plain", "fp8")],
)
def test_models_agree_with_the_reference(variant: str, weights: str) -> None:
    """GPUs do not round the inputs of 8-bit integers, which the head has beside int4."""
    config = dataclasses.replace(VARIANTS[variant], num_layers=2 if variant == "plain" and is_all() else 1)
    ours, theirs = (logits(config, ops, weights) for ops in (GpuOps(), REFERENCE))
    if weights in ("int8", "int4"):
        assert (ours - theirs).norm() < 0.03 * theirs.norm()
    else:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "kernels.gpu")
    with pytest.raises(ImportError, match=r"pip install 'magicdec\[cuda\]'"):
        importlib.import_module("kernels.gpu")


def test_whose_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", fake_flashinfer)
    ops = GpuOps(Workspace(torch.device("cpu"), (9, 0), multiprocessors=132))
    assert isinstance(ops.attention(16, 80), GpuAttention)
    assert isinstance(GpuOps().attention(16, 64), GpuAttention)
    assert ops.name != GpuOps().name
    ours, oracle, planned = ops.attention(16, 64), ReferenceAttention(16), []
    for kind in (FlashInferAttention, GpuAttention):
        plan = kind.plan

        def note(self: Any, batch: AttentionBatch, plan: Callable[..., None] = plan) -> None:
            planned.append(type(self))
            plan(self, batch)

        monkeypatch.setattr(kind, "plan", note)
    torch.manual_seed(0)
    layer, q = pool_layer(9, 1, 16, 64, torch.float16), torch.randn(5, 2, 64).half()
    for window in (0, 20, 0):
        batch = AttentionBatch([1, 4], [50, 70], torch.randint(9, (2, 5)), window=window)
        for backend in (ours, oracle):
            backend.plan(batch)
        torch.testing.assert_close(ours.run(layer, q, 0.1), oracle.run(layer, q, 0.1), rtol=2e-3, atol=2e-3)
    assert planned == [FlashInferAttention, GpuAttention, FlashInferAttention]


def test_whose_captured_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", fake_flashinfer)
    ops = GpuOps(Workspace(torch.device("cpu"), (9, 0), multiprocessors=132), Recorded)
    assert ops.make_graphs is not None
    graphs, pages = ops.make_graphs(), torch.zeros(2, 5, dtype=torch.int64)
    kinds = [type(graphs.attention(16, 64, GraphBatch(4, pages, pages[:, 0], window=window))) for window in (0, 20)]
    assert kinds == [FlashInferGraphAttention, GpuGraphAttention]


def model_on(ops: Ops, config: ModelConfig = TINY) -> DecoderModel:
    return random_model(config, 0, torch.float32, torch.device("cpu"), Group.single(), ops)


def requests() -> list[AddRequest]:
    sampling: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.8, "top_k": 9}]
    return [
        AddRequest(str(i), TEXT[: 3 + 5 * i], SamplingParams(max_tokens=NEW_TOKENS, seed=i, ignore_eos=True, **each))
        for i, each in enumerate(sampling)
    ]


def test_speculation_never_changes_output() -> None:
    """The engine without speculation runs on plain torch, which the interpreter takes a hundred times as long for."""
    config = TINY if is_all() else dataclasses.replace(TINY, num_layers=1, num_heads=4)
    plain = run(tiny_engine(model_on(REFERENCE, config), gamma=0), requests())
    engine = tiny_engine(model_on(GpuOps(), config), gamma=3, budget=8)
    drafted = run(engine, requests())
    assert {name: tokens(out) for name, out in drafted.items()} == {name: tokens(out) for name, out in plain.items()}
    assert engine.stats().rejections > 0
    assert engine.stats().accepted_tokens > 0


def rounds_of(engine: Engine, requests: list[AddRequest]) -> dict[str, list[tuple[list[int], int, int]]]:
    """For each request, the tokens, drafted count and accepted count of each of its rounds."""
    outputs = run(engine, requests)
    return {name: [(each.tokens, each.drafted, each.accepted) for each in out] for name, out in outputs.items()}


SNAPKV = {"policy": "snapkv", "budget": 8, "recent": 4}
WINDOW = {"policy": "window", "budget": 8, "sink": 4}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # outputs of padding queries are undefined
@pytest.mark.parametrize(
    ("drafter", "kv", "captured"),
    # For 1 row and for 2: a plain step, a target pass over three drafts, the first draft step, and the other two as one
    # graph. Drafters with a pool of their own, or that feed two tokens, capture separate forwards for rows that use
    # top-k.
    [
        only_in_all("self", WINDOW, 8, id="window"),
        only_in_all("self", SNAPKV, 10, id="snapkv"),
        pytest.param("model", WINDOW, 12, id="model, window"),
        only_in_all("model", SNAPKV, 12, id="model, snapkv"),
    ],
)
def test_graphs_change_neither_output_nor_drafts(
    tmp_path: Path, drafter: str, kv: dict[str, Any], captured: int
) -> None:
    """One row or two; with different numbers of drafts, the last queries are padding."""
    recorded = Recorded()
    model = model_on(GpuOps(make_recorder=lambda: recorded), ONE_LAYER)
    speculation = {
        "drafter": drafter,
        "kv": kv,
        **({"model": str(write_random_model(tmp_path / "twin", ONE_LAYER))} if drafter == "model" else {}),
    }
    length = 200 if is_all() else 32
    settings: dict[str, Any] = {"scheduler": {"max_rows": 2, "max_batch_tokens": 24}, "max_model_len": length}
    plain = tiny_engine(model_on(REFERENCE, ONE_LAYER), gamma=3, speculation=speculation, **settings)
    expected = rounds_of(plain, requests())
    assert rounds_of(tiny_engine(model, gamma=3, speculation=speculation, **settings), requests()) == expected
    assert recorded.captured == captured
    assert recorded.replayed > 5
    assert plain.stats().accepted_tokens > 5
    assert drafter == "model" or plain.stats().rejections > 5


def test_engines_of_one_model_capture_into_memory_of_their_own() -> None:
    """A closed engine frees its graphs, at once; the next one captures into new memory."""
    made: list[Recorded] = []

    def make_recorder() -> Recorded:
        made.append(Recorded())
        return made[-1]

    model = model_on(GpuOps(make_recorder=make_recorder), ONE_LAYER)
    for number in range(1, 4):
        scheduler = {"max_rows": 1, "max_batch_tokens": 16}
        engine = tiny_engine(model, gamma=1, budget=8, scheduler=scheduler, max_model_len=40)
        assert len(made) == number
        assert made[-1].held == made[-1].captured > 0
        engine.close()
        assert made[-1].released
        assert made[-1].held == 0


def test_an_engine_that_fails_to_start_releases_its_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even while its error, and with it what the failed calls held, is still there."""
    recorded = Recorded()
    model = model_on(GpuOps(make_recorder=lambda: recorded), ONE_LAYER)
    capture = recorded.capture

    def capture_three(work: Callable[[], None]) -> Callable[[], None]:
        if recorded.captured == 3:
            raise RuntimeError("CUDA out of memory")
        return capture(work)

    monkeypatch.setattr(recorded, "capture", capture_three)
    with pytest.raises(RuntimeError, match="out of memory"):
        tiny_engine(model, gamma=3, budget=8, scheduler={"max_rows": 2}, max_model_len=40)
    assert recorded.released


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_drafts_of_any_number_are_two_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a round may have different numbers of drafts."""
    recorded = Recorded()
    model = model_on(GpuOps(make_recorder=lambda: recorded), ONE_LAYER)
    new = 8 if is_all() else 4
    asked = [
        AddRequest(str(i), TEXT[: 3 + 5 * i], SamplingParams(max_tokens=new + 3 * i, temperature=1.0, seed=i))
        for i in range(2)
    ]
    script = [[2, 3], [1, 1], [3, 1], [0, 0], [0, 2], [2, 2], [1, 3]] * 4
    monkeypatch.setattr(Engine, "make_controller", lambda self: Scripted(script))

    def made(model: DecoderModel) -> Engine:
        speculation = {"gamma": "auto", "gamma_max": 3}
        settings: dict[str, Any] = {"scheduler": {"max_rows": 2}, "max_model_len": 40}
        return tiny_engine(model, gamma=0, budget=8, speculation=speculation, **settings)

    expected = rounds_of(made(model_on(REFERENCE, ONE_LAYER)), asked)
    engine = made(model)
    replays, step = [recorded.replayed], engine.step

    def step_and_count() -> list[RequestOutput]:
        outputs = step()
        replays.append(recorded.replayed)
        return outputs

    monkeypatch.setattr(engine, "step", step_and_count)
    assert rounds_of(engine, asked) == expected
    assert max(after - before for before, after in pairwise(replays)) == 3  # two for drafts, one for the target pass


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("policy", ["verified", "quest"])
def test_captured_verify_passes_choose_what_drafts_read(policy: str) -> None:
    """With lists per layer; rows that vote, and rows that are missing from a graph. The same drafts are accepted as
    where nothing is captured."""
    recorded, (first, new) = Recorded(), (31, 14) if is_all() else (17, 10)
    asked = [
        AddRequest(
            str(i),
            [2 + 7 * j % 60 for j in range(first + 7 * i)],
            SamplingParams(max_tokens=new + 4 * i, temperature=1.0, seed=i),
        )
        for i in range(2)
    ]
    speculation = {"kv": {"policy": policy, "budget": 4, "sink": 4}}
    settings: dict[str, Any] = {"scheduler": {"max_rows": 2}, "max_model_len": first + 29, "speculation": speculation}
    expected = rounds_of(tiny_engine(model_on(REFERENCE, ONE_HEAD), gamma=2, page_size=4, **settings), asked)
    engine = tiny_engine(model_on(GpuOps(make_recorder=lambda: recorded), ONE_HEAD), gamma=2, page_size=4, **settings)
    assert rounds_of(engine, asked) == expected
    assert recorded.replayed > 5
    stats = engine.stats()
    assert stats.rejections > 0
    assert stats.accepted_tokens > 3


@pytest.mark.parametrize("window", [0, 1, 5])
def test_captured_attention_follows_its_batch(window: int) -> None:
    """The last row has one query of its own, then none that sees three slots; its padding sees less, or nothing."""
    torch.manual_seed(0)
    layer = pool_layer(9, 2, 4, 16, torch.float32)
    batch = GraphBatch(4, torch.zeros(2, 5, dtype=torch.int64), torch.ones(2, dtype=torch.int64), window=window)
    ours, oracle = GpuGraphAttention(batch), ReferenceAttention(4)
    for queries, lengths in (([4, 4], [4, 4]), ([1, 4], [9, 17]), ([3, 1], [20, 1]), ([1, 1], [3, 8])):
        batch.pages.copy_(torch.randint(9, (2, 5)))
        batch.lengths.copy_(torch.tensor(lengths))
        ours.plan(lengths)
        q = torch.randn(8, 4, 16)
        own = torch.tensor([4 * row + 4 - count + i for row, count in enumerate(queries) for i in range(count)])
        oracle.plan(AttentionBatch(queries, lengths, batch.pages, window=window))
        for result, expected in zip(ours.run(layer, q, 0.25), oracle.run(layer, q[own], 0.25), strict=True):
            torch.testing.assert_close(result[own], expected)


def test_graph_row_counts() -> None:
    assert graph_row_counts(1) == [1]
    assert graph_row_counts(6) == [1, 2, 4, 6]
    assert graph_row_counts(100) == [1, 2, 4, 8, 16, 32, 64, 96, 100]
