"""Captured forwards of models with sliding layers give the text of plain ones, with and without drafts, prefix hits and
preemption. tests/unit/kernels/test_gpu_kernels.py describes where these run."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from engine.core import Engine
from kernels.ops import Ops
from kernels.reference_ops import REFERENCE
from models.decoder import DecoderModel
from models.loader import random_model
from models.model_config import ModelConfig
from parallel.group import Group
from tests.support.conversations import Turn, check_answers, check_hits, play
from tests.support.engines import TINY, run, tiny_engine
from tests.support.profiles import only_in_all
from tests.support.rig import CPU
from tests.support.workloads import kv_of, prompt_of

pytest.importorskip("triton", reason="Triton is not installed: there are no builds for this platform")

from kernels.gpu import INTERPRETED
from kernels.gpu.gpu_ops import GpuOps

if not INTERPRETED:
    pytest.skip("tests/gpu has these on a GPU", allow_module_level=True)

from tests.support.recorded import Recorded

WINDOW, LONGEST, PAGE = 6, 29, 4
ONE_HEAD = replace(TINY, hidden_size=16, intermediate_size=16, num_heads=1, num_kv_heads=1, head_dim=16)
SHAPES: dict[str, ModelConfig] = {
    "some layers": replace(ONE_HEAD, sliding_window=WINDOW, sliding_layers=(1,)),
    "all layers": replace(ONE_HEAD, num_layers=1, sliding_window=WINDOW + 4, sliding_layers=(0,)),  # more than a budget
}


def model_on(layers: str, ops: Ops) -> DecoderModel:
    return random_model(SHAPES[layers], 0, torch.float32, CPU, Group.single(), ops)


@cache
def plain(layers: str) -> Engine:
    """The engine whose answers are the reference; the interpreter takes a hundred times as long."""
    settings: dict[str, Any] = {"cache": {"prefix": False, "num_pages": 60, "memory_gb": None}}
    return tiny_engine(model_on(layers, REFERENCE), gamma=0, page_size=PAGE, max_model_len=LONGEST, **settings)


PARAMS = {"ignore_eos": True}
TURNS = [
    Turn("greedy", prompt_of(13, 1), params=PARAMS | {"max_tokens": 10}),
    Turn("sampled", prompt_of(7, 2), params=PARAMS | {"temperature": 1.0, "max_tokens": 14}),
    Turn("again", prompt_of(2, 3), after="greedy", params=PARAMS | {"max_tokens": 4}),
]
"""Two rows in a pool for 40 tokens: one of them is preempted. The last one finds the text of the first, so that a row's
windows begin with pages of another one."""


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # outputs of padding queries are undefined
@pytest.mark.parametrize(
    ("layers", "gamma", "policy"),
    [
        ("all layers", 2, "window"),
        only_in_all("some layers", 2, "window"),
        ("some layers", 0, "all"),
        only_in_all("all layers", 0, "all"),
        only_in_all("some layers", 2, "all"),
        only_in_all("all layers", 2, "all"),
        only_in_all("some layers", 2, "snapkv"),
        only_in_all("all layers", 2, "snapkv"),
        only_in_all("some layers", 2, "quest"),
        only_in_all("all layers", 2, "quest"),
        only_in_all("some layers", 2, "verified"),
    ],
)
def test_graphs_change_no_text(layers: str, gamma: int, policy: str) -> None:
    recorded = Recorded()
    engine = tiny_engine(
        model_on(layers, GpuOps(make_recorder=lambda: recorded)),
        gamma=gamma,
        page_size=PAGE,
        speculation={"kv": kv_of(policy, PAGE, 0 if policy == "window" else 1)},
        cache={"num_pages": 10, "memory_gb": None},
        scheduler={"max_rows": 2, "max_batch_tokens": 16},
        max_model_len=LONGEST,
    )
    played = play(engine, TURNS, LONGEST)
    check_answers(played, run(plain(layers), played.requests))
    check_hits(engine, played)
    stats = engine.stats()
    assert recorded.replayed > 4
    assert stats.prefix_hits > 0
    windows_alone = layers == "all layers" and policy in ("all", "window")
    assert (stats.preemptions > 0) is not windows_alone
    if gamma:
        assert stats.accepted_tokens > 5
        assert policy != "window" or stats.rejections > 0
    if layers == "some layers" or windows_alone:
        sliding = engine._worker._target.sliding
        assert sliding is not None
        scratch = sliding.pool._data[:, :, sliding.pool.num_pages :]
        assert scratch.any(), "padding writes to the scratch page"
