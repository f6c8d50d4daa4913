"""When graphs are destroyed: before the process group whose collectives they captured. NCCL waits for them for ever."""

from __future__ import annotations

import contextlib
import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kernels.gpu.cuda_graphs import CudaGraphs


class Group:
    """A process group, whose destructor waits for graphs that still exist."""

    def __init__(self, log: list[str]) -> None:
        self._log = log

    def __del__(self) -> None:
        self._log.append("group")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Order in which groups and graphs are destroyed; CUDA is replaced."""
    said: list[str] = []
    stream = SimpleNamespace(wait_stream=lambda other: None)
    graph = SimpleNamespace(replay=lambda: None, reset=lambda: said.append("graph"))
    names: dict[str, Any] = {
        "Stream": lambda device: stream,
        "current_stream": lambda device: stream,
        "stream": contextlib.nullcontext,
        "graph_pool_handle": lambda: (0, 1),
        "CUDAGraph": lambda: graph,
        "graph": lambda graph, **options: contextlib.nullcontext(),
    }
    for name, fake in names.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return said


def captured(group: Group) -> SimpleNamespace:
    """An engine: its group, which comes first, and what holds graphs."""
    graphs = CudaGraphs(torch.device("cuda", 0))
    replays = [graphs.capture(lambda: None) for _ in range(2)]
    return SimpleNamespace(group=group, graphs=graphs, replays=replays)


def test_released_before_anything_else_goes(log: list[str]) -> None:
    engine = captured(Group(log))
    engine.graphs.release()
    assert log == ["graph", "graph"]
    del engine
    assert log == ["graph", "graph", "group"]


def test_collected_in_a_cycle(log: list[str]) -> None:
    engine = captured(Group(log))
    engine.itself = engine
    del engine
    gc.collect()
    assert log == ["graph", "graph", "group"]


def test_released_when_python_ends(log: list[str]) -> None:
    assert captured(Group(log)).graphs.release.atexit
