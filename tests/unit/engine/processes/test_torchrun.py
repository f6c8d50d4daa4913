"""Ranks that torchrun starts: kernels are compiled before ranks wait for each other."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.config.deployment import ConfigError, EngineConfig
from engine.processes import torchrun
from parallel.group import CollectiveError


@pytest.mark.parametrize(
    ("device", "local_rank", "expected"),
    [
        ("auto", 1, ["cuda:1", "resolve", "connect"]),
        ("cpu", 1, ["connect"]),
        ("auto", 2, ["connect"]),  # no such GPU: reported once rank 0 can be told
    ],
)
def test_compiling_comes_before_connecting(
    monkeypatch: pytest.MonkeyPatch, device: Any, local_rank: int, expected: list[str]
) -> None:
    steps: list[str] = []

    def resolve(*_: object, sizes_pool: bool) -> None:
        assert not sizes_pool
        steps.append("resolve")
        raise ConfigError("engine.kernels: none")

    def connect(*_: object, **__: object) -> None:
        steps.append("connect")
        raise CollectiveError("nobody is there")

    monkeypatch.setattr(torchrun, "resolve", resolve)
    monkeypatch.setattr(torchrun, "_on_stop", lambda act: None)
    monkeypatch.setattr("engine.processes.torchrun.tcp_bootstrap.connect", connect)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: steps.append(f"cuda:{index}"))
    env = SimpleNamespace(rank=3, local_rank=local_rank, store=lambda timeout_s: None)
    assert torchrun._run_other_rank(EngineConfig(model="m", device=device), env) == 1  # type: ignore[arg-type]
    assert steps == expected
