"""Updates of weights and sleep, on ranks that are processes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from engine.core import Engine
from engine.messages import AddRequest, EngineState
from engine.params import SamplingParams
from engine.plan import WeightStep
from engine.ranks.resident_weights import WeightsRefused
from parallel.group import RankFailure
from tests.support.engines import run, tokens
from tests.support.profiles import is_all, whole_test_only_in_all
from tests.support.ranks import PROCESS_MODEL, write_random_model
from tests.support.weights import FAULTS, requests, rows, start

INT8 = {"gamma": 3, "weights": "int8", "kv": {"budget": 64, "sink": 4}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories of weights, 0 and 1, and of a draft model."""
    folder = tmp_path_factory.mktemp("weights")
    for seed in range(2):
        write_random_model(folder / str(seed), PROCESS_MODEL, seed=seed)
    write_random_model(folder / "draft", replace(PROCESS_MODEL, num_layers=1), seed=7)
    return folder


@pytest.fixture(scope="module")
def started(folders: Path) -> Iterator[Engine]:
    """An engine of two ranks, whose drafts have weights of their own, of 8 bits."""
    engine = start(folders / "0", 2, speculation=INT8)
    yield engine
    engine.close()


@pytest.fixture
def pair(started: Engine, folders: Path) -> Engine:
    """The started engine, with weights 0 and an empty prefix cache."""
    started.update_weights(str(folders / "0"))
    return started


def fresh(folder: Path, **others: Any) -> Any:
    engine = start(folder, 2, **others)
    try:
        return rows(engine)
    finally:
        engine.close()


def test_after_an_update_all_is_as_on_fresh_ranks(pair: Engine, folders: Path) -> None:
    expected = [
        rows(pair) if seed == 0 and not is_all() else fresh(folders / str(seed), speculation=INT8) for seed in range(2)
    ]
    alone = start(folders / "1", speculation=INT8)
    assert {id: row[0] for id, row in rows(alone).items()} == {id: row[0] for id, row in expected[1].items()}
    alone.close()
    if is_all():
        assert rows(pair) == expected[0]
    turns = (1, 0, 1) if is_all() else (1, 0)
    for seed in turns[:-1]:
        pair.update_weights(str(folders / str(seed)))
        pair.check_ranks()
        assert rows(pair) == expected[seed]
    pair.sleep()
    pair.check_ranks()
    pair.update_weights(str(folders / str(turns[-1])))
    pair.wake_up()
    assert rows(pair) == expected[turns[-1]]


@whole_test_only_in_all
def test_a_draft_model_on_one_of_two_ranks_stays(folders: Path) -> None:
    speculation = {
        "gamma": 3,
        "drafter": "model",
        "model": str(folders / "draft"),
        "tensor_parallel_size": 1,
        "kv": {"policy": "all"},
    }
    expected = [fresh(folders / str(seed), speculation=speculation) for seed in range(2)]
    engine = start(folders / "0", 2, speculation=speculation)
    assert rows(engine) == expected[0]
    drafts = engine._worker.draft.model
    engine.update_weights(str(folders / "1"))
    assert engine._worker.draft.model is drafts
    assert rows(engine) == expected[1]
    engine.sleep()
    engine.wake_up()
    assert rows(engine) == expected[1]
    engine.close()


@whole_test_only_in_all
@pytest.mark.parametrize("fault", ["missing", "shape", "truncated"])
def test_a_refused_update_changes_nothing(pair: Engine, folders: Path, tmp_path: Path, fault: str) -> None:
    spoil, message = FAULTS[fault]
    bad = shutil.copytree(folders / "1", tmp_path / "bad")
    spoil(bad)
    expected = rows(pair)
    with pytest.raises(WeightsRefused) as refused:
        pair.update_weights(str(bad))
    assert message in str(refused.value)
    outputs = run(pair, requests())
    assert {id: tokens(each) for id, each in outputs.items()} == {id: row[0] for id, row in expected.items()}
    assert sum(each[0].cached_tokens for each in outputs.values()) > 0


@pytest.mark.parametrize("action", ["check", "load"])
def test_what_one_rank_refuses_changes_nothing_on_the_others(
    pair: Engine, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    """The directory is good where rank 0 looks, and gone on rank 1."""
    expected, gone = rows(pair), str(tmp_path / "gone")
    perform = pair._owner.perform

    def elsewhere(step: WeightStep) -> str | None:
        return perform(WeightStep(step.action, step.path.replace(gone, str(folders / "1"))))

    monkeypatch.setattr(pair._owner, "perform", elsewhere)
    if action == "load":
        monkeypatch.setattr(pair._weights, "check", lambda path: None)
    with pytest.raises(WeightsRefused, match=f"^rank 1: {gone}: no such model directory"):
        pair.update_weights(gone)
    assert {id: row[0] for id, row in rows(pair).items()} == {id: row[0] for id, row in expected.items()}


def test_running_requests_of_ranks_go_on(pair: Engine, folders: Path) -> None:
    prompt = list(range(3, 40))
    pair.add(AddRequest("one", prompt, SamplingParams(max_tokens=40, temperature=1.0, seed=5)))
    before: list[int] = []
    while len(before) < 10:
        before += tokens(pair.step())
    pair.update_weights(str(folders / "1"))
    after: list[int] = []
    while pair.has_work():
        after += tokens(pair.step())
    rest = SamplingParams(max_tokens=40 - len(before), temperature=1.0, seed=5)
    alone = start(folders / "1")
    assert after == tokens(run(alone, [AddRequest("rest", prompt + before, rest)])["rest"])
    alone.close()


def test_a_rank_that_dies_asleep_is_noticed(pair: Engine) -> None:
    """Last test of this engine."""
    pair.sleep()
    assert pair._ranks
    psutil.Process(pair._ranks.pids[1]).kill()
    with pytest.raises(RankFailure, match="rank 1"):
        pair.wake_up()


@whole_test_only_in_all
def test_sleep_gives_memory_back(tmp_path: Path) -> None:
    """Weights of 60 MB, half of them on each rank, their copies of 8 bits, and KV that was written."""
    sizes: dict[str, Any] = {"num_layers": 4, "num_heads": 8, "num_kv_heads": 2, "head_dim": 64}
    large = replace(PROCESS_MODEL, hidden_size=512, intermediate_size=1536, **sizes)
    directory = write_random_model(tmp_path / "large", large, dtype=torch.float32)
    cache = {"page_size": 16, "memory_gb": 0.2}
    engine = start(directory, 2, dtype="float32", cache=cache, speculation=INT8 | {"kv": {"budget": 64}})
    assert engine._ranks
    processes = [psutil.Process(pid) for pid in (os.getpid(), engine._ranks.pids[1])]

    def resident() -> list[float]:
        return [process.memory_info().rss / 1e6 for process in processes]

    expected = rows(engine)
    awake = resident()
    weights = engine.weight_bytes.total / 2e6
    engine.sleep()
    asleep = resident()
    assert all(before - after > 0.9 * weights for before, after in zip(awake, asleep, strict=True))
    engine.wake_up()
    assert engine.state is EngineState.RUNNING
    assert rows(engine) == expected
    engine.sleep()
    assert all(again < after + 0.2 * weights for again, after in zip(resident(), asleep, strict=True))
    engine.close()
