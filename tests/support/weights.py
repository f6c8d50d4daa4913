"""Engines whose weights change, and directories of weights that they must refuse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from engine.config.deployment import EngineConfig
from engine.core import Engine
from engine.messages import AddRequest
from engine.params import SamplingParams
from tests.support.engines import run, tokens
from tests.support.ranks import settings

Row = tuple[list[int], list[tuple[int, int]]]
"""Tokens of a request, and how many tokens each of its rounds drafted and accepted."""


def start(directory: Path, size: int = 1, gamma: int = 3, **others: Any) -> Engine:
    """Start an engine of `size` ranks, in float64 unless `others` say otherwise."""
    chosen = settings(gamma, model=str(directory), dtype="float64", tensor_parallel_size=size, max_model_len=None)
    return Engine(EngineConfig.model_validate(chosen | others), progress=False)


def requests() -> list[AddRequest]:
    """Greedy and sampled requests, with prompts of less than a page and of many, two of which begin alike."""
    ways: list[dict[str, Any]] = [
        {"temperature": 0.0, "logprobs": 1},
        {"temperature": 1.0},
        {"temperature": 0.0},
        {"temperature": 1.0, "top_k": 9, "repetition_penalty": 1.1},
    ]
    return [
        AddRequest(str(i), [3 + j % 50 for j in range(2 + 25 * i)], SamplingParams(max_tokens=24, seed=i, **way))
        for i, way in enumerate(ways)
    ]


def rows(engine: Engine) -> dict[str, Row]:
    """Run `requests`, and return what became of each."""
    return {
        id: (tokens(outputs), [(output.drafted, output.accepted) for output in outputs])
        for id, outputs in run(engine, requests()).items()
    }


def found(engine: Engine) -> int:
    """Run `requests`, and return the number of prompt tokens that the prefix cache held."""
    return sum(outputs[0].cached_tokens for outputs in run(engine, requests()).values())


def _change_config(directory: Path, **keys: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys), encoding="utf-8")


def _change_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def _truncate(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _pickle(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


UP = "model.layers.1.mlp.up_proj.weight"
FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "gone": (lambda path: shutil.rmtree(path), "no such model directory"),
    "no config": (lambda path: (path / "config.json").unlink(), "config.json: not found"),
    "other size": (lambda path: _change_config(path, num_hidden_layers=1), "num_layers is not that of the model"),
    "other rope": (lambda path: _change_config(path, rope_theta=1e5), "rope is not that of the model in use"),
    "missing": (lambda path: _change_tensors(path, lambda each: each.__delitem__(UP)), "tensors missing"),
    "extra": (
        lambda path: _change_tensors(path, lambda each: each.update(extra=torch.zeros(2))),
        "unexpected tensor extra",
    ),
    "shape": (
        lambda path: _change_tensors(path, lambda each: each.update({UP: each[UP][1:].contiguous()})),
        f"tensor {UP} has shape",
    ),
    "type": (
        lambda path: _change_tensors(path, lambda each: each.update({UP: each[UP].to(torch.int8)})),
        f"tensor {UP} has unsupported type I8",
    ),
    "truncated": (_truncate, "not a readable safetensors file"),
    "pickled": (_pickle, "only pickled weights (pytorch_model.bin)"),
}
"""By name: what is wrong with a directory, and what the refusal says."""
