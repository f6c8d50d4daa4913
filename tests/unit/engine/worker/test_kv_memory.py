"""Size of the pool where memory is measured. tests/gpu tests the measuring itself."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from engine.config.deployment import ConfigError, EngineConfig
from engine.worker.kv_memory import DeviceMemory, determine_num_pages, run_largest_round
from engine.worker.resolve import Resolved, resolve
from models.llama import Llama
from parallel.group import Group
from tests.support.engines import tiny_model
from tests.support.rig import run_ranks

MEGABYTE = 1_000_000
PAGE = 4 * 2 * 2 * 2 * 8 * 8  # bytes: tokens, keys and values, layers, heads, elements, of float64


def sized(model: Llama, **cache: Any) -> tuple[EngineConfig, Resolved]:
    """Settings and sizes on a GPU when the pool's size is not set."""
    settings = {"model": "tiny", "cache": {"page_size": 4}, "max_model_len": 400}
    sizes = dataclasses.replace(resolve(EngineConfig.model_validate(settings), model), num_pages=None)
    return EngineConfig.model_validate(settings | {"cache": {"page_size": 4, **cache}}), sizes


def test_the_pool_takes_what_is_left() -> None:
    model = tiny_model()
    config, sizes = sized(model)
    memory = DeviceMemory(total=100 * MEGABYTE, used=70 * MEGABYTE, running=15 * MEGABYTE)
    assert determine_num_pages(config, sizes, model, Group.single(), memory) == 5 * MEGABYTE // PAGE
    config, sizes = sized(model, gpu_memory_utilization=0.88)
    assert determine_num_pages(config, sizes, model, Group.single(), memory) == 3 * MEGABYTE // PAGE
    plenty = dataclasses.replace(memory, used=0)
    assert determine_num_pages(config, sizes, model, Group.single(), plenty) == 100 * config.scheduler.max_rows


@pytest.mark.parametrize("said", [{"num_pages": 900}, {"memory_gb": 1}, {}], ids=["num_pages", "memory_gb", "cpu"])
def test_a_share_of_what_does_not_count_is_refused(said: dict[str, Any]) -> None:
    config = EngineConfig.model_validate({"model": "tiny", "cache": {"gpu_memory_utilization": 0.5, **said}})
    with pytest.raises(ConfigError, match=f"{next(iter(said), 'memory_gb')} sets the size of the pool"):
        resolve(config, tiny_model())


def test_too_little_is_an_error() -> None:
    model = tiny_model()
    config, sizes = sized(model)
    memory = DeviceMemory(total=100 * MEGABYTE, used=85 * MEGABYTE, running=9 * MEGABYTE)
    with pytest.raises(ConfigError, match="0 pages of 4 tokens hold less than one request of max_model_len 400"):
        determine_num_pages(config, sizes, model, Group.single(), memory)


def test_the_rank_with_least_decides() -> None:
    model = tiny_model()
    config, sizes = sized(model)

    def fit(group: Group) -> int:
        memory = DeviceMemory(100 * MEGABYTE, (60 + 7 * group.rank) * MEGABYTE, 10 * MEGABYTE)
        return determine_num_pages(config, sizes, model, group, memory)

    assert run_ranks(3, fit) == [6 * MEGABYTE // PAGE] * 3


@pytest.mark.parametrize("tokens", [65, 512])
def test_the_largest_round_runs(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    config = EngineConfig.model_validate({"model": "tiny", "scheduler": {"max_batch_tokens": tokens}})
    asked = []
    logits = Llama.logits

    def watched(self: Llama, states: torch.Tensor) -> torch.Tensor:
        asked.append(len(states))
        return logits(self, states)

    monkeypatch.setattr(Llama, "logits", watched)
    run_largest_round(config, tiny_model())
    assert asked == [min(tokens, config.scheduler.max_rows * (config.speculation.max_draft_tokens + 1))]
