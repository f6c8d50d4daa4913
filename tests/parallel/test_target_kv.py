"""A target that reads part of its KV gives the same output on any number of ranks, with drafts or without."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from engine.config.deployment import ConfigError
from tests.support.engines import run, tokens
from tests.support.head_files import write_head_shares
from tests.support.profiles import only_in_all
from tests.support.rank_law import alone, model, ops_of, requests
from tests.support.ranks import threaded_engine

SHAPE = (9, 3)
TARGET = {"policy": "quest", "budget": 4, "interval": 3, "sink": 4, "window": 4}
SHARES = [[0.4, 0.1, 0.2], [0.6, 0.3, 0.5]]  # 0-based heads 1 and 2 of the first layer and 1 of the second stream


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_head_shares(tmp_path_factory.mktemp("heads"), SHARES)


@cache
def output(size: int, gamma: int, heads: str | None, on_kernels: bool = False) -> dict[str, list[int]]:
    target: dict[str, Any] = TARGET | {"heads": heads}
    dtype = torch.float32 if on_kernels else torch.float64
    engine, _ = threaded_engine(
        model(*SHAPE), size, gamma=gamma, dtype=dtype, digest_every=3, ops=ops_of(on_kernels), target_kv=target
    )
    try:
        return {id: tokens(outputs) for id, outputs in run(engine, requests()).items()}
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("size", "gamma", "streams"),
    [
        *((1, 3, False), (2, 3, True), (3, 0, True), (3, 2, False)),
        *(only_in_all(size, gamma, not streams) for size, gamma, streams in ((1, 3, False), (2, 3, True))),
        *(only_in_all(size, gamma, not streams) for size, gamma, streams in ((3, 0, True), (3, 2, False))),
        *(only_in_all(2, 0, streams) for streams in (False, True)),
    ],
)
def test_ranks_never_change_output(size: int, gamma: int, streams: bool, heads: str) -> None:
    assert output(size, gamma, heads if streams else None) == output(1, 0, heads if streams else None)


@pytest.mark.parametrize(("size", "gamma"), [(2, 3), only_in_all(3, 0)])
def test_nor_on_compiled_kernels(size: int, gamma: int, heads: str) -> None:
    assert output(size, gamma, heads, True) == output(1, 0, heads, True)


def test_three_different_targets(heads: str) -> None:
    dense = {id: tokens(outputs) for id, outputs in alone(SHAPE, torch.float64).items()}
    assert dense != output(1, 0, None) != output(1, 0, heads) != dense


def test_ranks_that_split_a_kv_head_are_refused() -> None:
    with pytest.raises(ConfigError, match="4 ranks would split the query heads of 3 KV heads"):
        threaded_engine(model(*SHAPE), 4, gamma=0, target_kv=TARGET)
