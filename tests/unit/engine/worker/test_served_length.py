"""Length of the longest request: what it costs, and what it is where memory holds less than the model's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config.deployment import EngineConfig
from engine.core import Engine
from engine.messages import AddRequest
from engine.params import SamplingParams
from engine.worker.build import load_draft
from engine.worker.loading import load_shard
from engine.worker.resolve import resolve
from models.llama import Llama
from parallel.group import Group
from parallel.layers import Placement
from tests.support.engines import TINY, complete_all
from tests.support.ranks import DRAFT, settings, write_random_model
from tests.support.rig import CPU

LONG = replace(TINY, max_position_embeddings=4_194_304)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("models") / "long", LONG)


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("models") / "draft", replace(DRAFT, max_position_embeddings=40))


def configured(directory: Path, **others: Any) -> EngineConfig:
    return EngineConfig.model_validate(settings(3, model=str(directory), dtype="float64", **others))


def test_rotary_tables_have_the_served_length(directory: Path, draft: Path) -> None:
    speculation = {"gamma": 3, "drafter": "model", "model": str(draft)}
    config = configured(directory, max_model_len=4096, speculation=speculation)
    resolved, group = resolve(config, None), Group.single()
    target = load_shard(config, resolved, CPU, group, progress=False)
    drafting = load_draft(config, target, resolved.max_model_len, group).model
    assert drafting is not None
    for model in (target, drafting):
        assert [len(table) for table in model.rotary] == [4096, 4096]


def test_shapes_without_weights_cost_nothing() -> None:
    before = torch.randn(1)  # the meta device allocates nothing, and computes nothing on the CPU
    model = Llama(
        replace(LONG, max_position_embeddings=2**40), Placement(Group.single(), before.dtype, torch.device("meta"))
    )
    assert len(model.rotary[0]) == 2**40


@pytest.mark.parametrize("speculation", ["self", "window", "snapkv", "all"])
def test_requests_of_the_served_length(directory: Path, draft: Path, speculation: str) -> None:
    """Every position of the longest request is in the tables, also those that are only drafted."""
    kv: dict[str, Any] = {"policy": "window" if speculation == "self" else speculation, "budget": 16}
    kv = {"policy": "all"} if speculation == "all" else kv | ({"recent": 8} if speculation == "snapkv" else {"sink": 4})
    drafter = {} if speculation == "self" else {"drafter": "model", "model": str(draft)}
    requests = [
        AddRequest(
            str(length), [2 + i % 60 for i in range(length)], SamplingParams(max_tokens=96 - length, ignore_eos=True)
        )
        for length in (1, 50, 93, 95)
    ]
    found = []
    for gamma in (0, 3):
        config = configured(directory, max_model_len=96, speculation={"gamma": gamma, "kv": kv, **drafter})
        engine = Engine(config, progress=False)
        assert len(engine._worker.model.rotary[0]) == 96
        found.append(complete_all(engine, requests))
        engine.close()
    assert found[0] == found[1]
    assert [len(tokens) for tokens in found[0].values()] == [95, 46, 3, 1]
