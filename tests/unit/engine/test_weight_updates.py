"""Pause, updates of weights and sleep, on an engine of one rank."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config.deployment import EngineConfig
from engine.core import Engine
from engine.messages import AddRequest, EngineState
from engine.params import SamplingParams
from engine.plan import WeightStep
from engine.ranks.resident_weights import WeightsRefused
from models.loader import load_model
from parallel.group import Group
from parallel.matrix_layer import WeightChoice
from tests.support.architecture_variants import VARIANTS, write_variant
from tests.support.engines import TINY, complete, run, tokens
from tests.support.profiles import is_all, only_in_all
from tests.support.ranks import DRAFT, settings, write_random_model
from tests.support.rig import CPU
from tests.support.weights import FAULTS, Row, found, requests, rows, start

INT8 = {"weights": "int8", "kv": {"budget": 64, "sink": 4}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories of weights, 0 to 2, and of a draft model."""
    folder = tmp_path_factory.mktemp("weights")
    for seed in range(3):
        write_random_model(folder / str(seed), TINY, seed=seed)
    write_random_model(folder / "draft", DRAFT, seed=7)
    return folder


Starter = Callable[..., Engine]


@pytest.fixture
def engine(folders: Path) -> Iterator[Starter]:
    """Return a function that starts an engine with one of the weights."""
    started: list[Engine] = []

    def start_one(seed: int, **others: Any) -> Engine:
        started.append(start(folders / str(seed), **others))
        return started[-1]

    yield start_one
    for each in started:
        each.close()


@pytest.fixture(scope="module")
def fresh(folders: Path) -> Callable[[int], dict[str, Row]]:
    """Return a function that tells what becomes of the requests on a fresh engine with one of the weights."""

    @cache
    def rows_of(seed: int) -> dict[str, Row]:
        started = start(folders / str(seed))
        found = rows(started)
        started.close()
        return found

    return rows_of


@pytest.mark.parametrize(
    "others",
    [
        pytest.param({}, id="self"),
        only_in_all({"gamma": 0}, id="plain"),
        only_in_all({"speculation": {"gamma": 3, **INT8}}, id="int8 drafts"),
        pytest.param(
            {"dtype": "float32", "kernels": "cpu", "speculation": {"gamma": 3, **INT8}}, id="packed int8 drafts"
        ),
        only_in_all({"dtype": "float32", "kernels": "cpu", "weights": "int8"}, id="packed int8"),
        pytest.param({"speculation": {"gamma": 3, "kv": {"policy": "quest", "budget": 16, "sink": 4}}}, id="quest"),
        pytest.param({"speculation": {"gamma": 3, "drafter": "model", "kv": {"policy": "all"}}}, id="draft model"),
    ],
)
def test_after_an_update_all_is_as_on_a_fresh_engine(engine: Starter, folders: Path, others: dict[str, Any]) -> None:
    """Drafts too: each round drafts and accepts as many tokens."""
    if "drafter" in others.get("speculation", {}):
        others = {"speculation": {**others["speculation"], "model": str(folders / "draft")}}
    expected = [rows(engine(seed, **others)) for seed in range(3 if is_all() else 2)]
    changed = engine(0, **others)
    assert rows(changed) == expected[0]
    for seed in (1, 2, 0, 0) if is_all() else (1, 0):
        changed.update_weights(str(folders / str(seed)))
        assert changed.stats().pages_cached == 0
        assert rows(changed) == expected[seed]
    assert expected[0] != expected[1]


def test_no_kv_of_old_weights_is_found(engine: Starter, folders: Path) -> None:
    changed = engine(0)
    assert (found(changed), found(changed) > 0) == (expected := found(engine(0)), True)
    changed.update_weights(str(folders / "1"))
    assert (found(changed), found(changed) > 0) == (expected, True)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_running_requests_go_on_with_their_tokens(engine: Starter, folders: Path, temperature: float) -> None:
    changed, prompt = engine(0), list(range(3, 40))
    params = SamplingParams(max_tokens=40, temperature=temperature, seed=5)
    changed.add(AddRequest("one", prompt, params))
    before: list[int] = []
    while len(before) < 10:
        before += tokens(changed.step())
    changed.update_weights(str(folders / "1"))
    after: list[int] = []
    while changed.has_work():
        after += tokens(changed.step())
    rest = SamplingParams(max_tokens=40 - len(before), temperature=temperature, seed=5)
    assert after == complete(engine(1), prompt + before, rest)
    assert changed.stats().preemptions == 1


@pytest.fixture(scope="module")
def refusing(folders: Path) -> Iterator[Engine]:
    """An engine that only hears of updates which it refuses."""
    started = start(folders / "0")
    rows(started)
    yield started
    started.close()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_refused_update_changes_nothing(
    refusing: Engine, fresh: Callable[[int], dict[str, Row]], folders: Path, tmp_path: Path, fault: str
) -> None:
    spoil, message = FAULTS[fault]
    bad = shutil.copytree(folders / "1", tmp_path / "bad")
    spoil(bad)
    changed, expected = refusing, fresh(0)
    changed.add(AddRequest("running", [5] * 30, SamplingParams(max_tokens=30)))
    changed.step()
    with pytest.raises(WeightsRefused) as refused:
        changed.update_weights(str(bad))
    assert message in str(refused.value)
    assert str(bad) in str(refused.value)
    assert str(folders) not in str(refused.value)
    assert (changed.state, changed.stats().running, changed.stats().preemptions) == (EngineState.RUNNING, 1, 0)
    changed.abort(["running"])
    outputs = run(changed, requests() if is_all() else requests()[-1:])
    assert {id: tokens(each) for id, each in outputs.items()} == {id: expected[id][0] for id in outputs}
    assert sum(each[0].cached_tokens for each in outputs.values()) > 0


def test_weights_that_vanish_after_the_check(
    engine: Starter,
    fresh: Callable[[int], dict[str, Row]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The former ones are loaded back; if they are gone too, the engine fails."""
    changed, expected = engine(0), fresh(0)
    monkeypatch.setattr(changed._weights, "check", lambda path: None)
    with pytest.raises(WeightsRefused, match="no such model directory"):
        changed.update_weights(str(tmp_path / "gone"))
    assert rows(changed) == expected
    monkeypatch.setattr(changed._weights, "_path", str(tmp_path / "gone too"))
    with pytest.raises(RuntimeError, match="former weights cannot be loaded back"):
        changed.update_weights(str(tmp_path / "gone"))


def test_token_ids_of_the_first_weights_stay(
    engine: Starter, fresh: Callable[[int], dict[str, Row]], folders: Path, tmp_path: Path
) -> None:
    """A trainer may save no generation_config.json, and so name fewer tokens that end a text."""
    config = (folders / "1" / "config.json").read_text()
    other = shutil.copytree(folders / "1", tmp_path / "other")
    (other / "config.json").write_text(config.replace('"eos_token_id": [1]', '"eos_token_id": [2]'))
    changed = engine(0)
    changed.update_weights(str(other))
    assert changed._worker.model.config.eos_token_ids == (1,)
    assert rows(changed) == fresh(1)


# -- pause -------------------------------------------------------------------------------------------------------------


def test_a_pause_changes_no_text(engine: Starter, fresh: Callable[[int], dict[str, Row]]) -> None:
    expected, paused = fresh(0), engine(0)
    outputs: dict[str, list[int]] = {}
    for request in requests()[:3]:
        paused.add(request)
    for _ in range(5):
        for output in paused.step():
            outputs.setdefault(output.id, []).extend(output.tokens)
    rounds = paused.stats().rounds
    assert paused.pause() == paused.pause() == []
    paused.add(requests()[3])
    assert not paused.has_work()
    assert paused.step() == []
    stats = paused.stats()
    assert (stats.state, stats.running, stats.waiting, stats.rounds) == ("paused", 3, 1, rounds)
    paused.resume()
    paused.resume()
    while paused.has_work():
        for output in paused.step():
            outputs.setdefault(output.id, []).extend(output.tokens)
    assert outputs == {id: each for id, (each, _) in expected.items()}
    assert paused.stats().preemptions == 0


def test_a_pause_that_aborts(engine: Starter) -> None:
    paused = engine(0, scheduler={"max_rows": 2, "max_batch_tokens": 64})
    for request in requests():
        paused.add(request)
    paused.step()
    assert (paused.stats().running, paused.stats().waiting) == (2, 2)
    ended = paused.pause(abort=True)
    assert sorted(output.id for output in ended) == ["0", "1", "2", "3"]
    assert {output.finish_reason for output in ended} == {"abort"}
    assert (paused.stats().running, paused.stats().waiting, paused.state) == (0, 0, EngineState.PAUSED)
    paused.resume()
    assert rows(paused) == rows(engine(0, scheduler={"max_rows": 2, "max_batch_tokens": 64}))


def test_aborts_of_paused_requests(engine: Starter) -> None:
    paused = engine(0)
    paused.add(requests()[2])
    paused.step()
    paused.pause()
    paused.abort(["2"])
    paused.resume()
    assert not paused.has_work()
    assert paused.stats().pages_free + paused.stats().pages_cached == paused.stats().pages_total


# -- sleep -------------------------------------------------------------------------------------------------------------


def test_sleep_frees_and_wake_up_goes_on(engine: Starter, fresh: Callable[[int], dict[str, Row]]) -> None:
    expected, slept = fresh(0), engine(0)
    for request in requests()[:2]:
        slept.add(request)
    outputs: dict[str, list[int]] = {}
    for _ in range(3):
        for output in slept.step():
            outputs.setdefault(output.id, []).extend(output.tokens)
    model, pool = weakref.ref(slept._worker.model), weakref.ref(slept._worker._target.pool)
    slept.sleep()
    slept.sleep()
    assert (model(), pool(), slept.state) == (None, None, EngineState.ASLEEP)
    for request in requests()[2:]:
        slept.add(request)
    assert not slept.has_work()
    assert (slept.stats().running, slept.stats().waiting) == (0, 4)
    slept.wake_up()
    slept.wake_up()
    while slept.has_work():
        for output in slept.step():
            outputs.setdefault(output.id, []).extend(output.tokens)
    assert outputs == {id: each for id, (each, _) in expected.items()}


def test_an_engine_wakes_with_its_newest_weights(
    engine: Starter, fresh: Callable[[int], dict[str, Row]], folders: Path
) -> None:
    slept = engine(0)
    slept.update_weights(str(folders / "1"))
    slept.sleep()
    slept.wake_up()
    assert rows(slept) == fresh(1)
    slept.sleep()
    slept.update_weights(str(folders / "2"))
    assert slept.stats().state is EngineState.ASLEEP
    with pytest.raises(WeightsRefused, match="no such model directory"):
        slept.update_weights(str(folders / "3"))
    slept.wake_up()
    assert rows(slept) == fresh(2)


def test_a_loaded_model_keeps_its_formats(folders: Path) -> None:
    """Those that it was loaded with, where settings name none."""
    path, choice = folders / "0", WeightChoice("int4", "int8")
    one = Group.single()
    model = load_model(path, dtype=torch.float64, device=CPU, group=one, progress=False, weights=choice)
    slept = Engine(EngineConfig.model_validate(settings(3, model=str(path), max_model_len=None)), model=model)
    del model
    before, formats = rows(slept), slept.stats().weights
    slept.sleep()
    slept.wake_up()
    assert slept.stats().weights == formats == {"target": "int4 and int8", "drafts": "int8"}
    assert rows(slept) == before
    slept.close()


def test_a_loaded_model_rotates_by_the_length_that_is_served(tmp_path: Path) -> None:
    """As one does that is loaded for this length, at start and after sleep."""
    write_variant(VARIANTS["internlm3"], tmp_path)
    model = load_model(tmp_path, dtype=torch.float64, device=CPU, group=Group.single(), progress=False)
    length = 128
    assert model.config.rope.original_max_positions < length < model.max_positions
    fresh = start(tmp_path, max_model_len=length)
    config = EngineConfig.model_validate(settings(3, model=str(tmp_path), max_model_len=length))
    slept = Engine(config, model=model)
    assert rows(slept) == (expected := rows(fresh))
    slept.sleep()
    slept.wake_up()
    assert rows(slept) == expected
    assert model.max_positions == 192  # other engines may share it
    for each in (fresh, slept):
        each.close()


def test_a_pause_outlasts_sleep(engine: Starter, folders: Path) -> None:
    slept = engine(0)
    slept.pause()
    slept.sleep()
    slept.wake_up()
    assert slept.stats().state is EngineState.PAUSED
    slept.sleep()
    slept.resume()
    assert slept.stats().state is EngineState.ASLEEP
    slept.wake_up()
    assert slept.stats().state is EngineState.RUNNING


def test_an_engine_that_cannot_wake_sleeps_on(
    fresh: Callable[[int], dict[str, Row]], folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = shutil.copytree(folders / "0", tmp_path / "own")
    slept, expected = start(own), fresh(0)
    slept.sleep()
    own.rename(tmp_path / "elsewhere")
    with pytest.raises(WeightsRefused, match="no such model directory"):
        slept.wake_up()
    (tmp_path / "elsewhere").rename(own)
    perform = slept._owner.perform

    def full(step: WeightStep) -> str | None:
        return "out of memory" if step.action == "build" else perform(step)

    with monkeypatch.context() as patch:
        patch.setattr(slept._owner, "perform", full)
        with pytest.raises(WeightsRefused, match="out of memory"):
            slept.wake_up()
    assert slept.stats().state is EngineState.ASLEEP
    slept.wake_up()
    assert rows(slept) == expected
    slept.close()


def test_a_check_refuses_whatever_fails(
    engine: Starter, fresh: Callable[[int], dict[str, Row]], folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = engine(0)

    def fail(*_: object) -> None:
        raise KeyError("model")

    monkeypatch.setattr("engine.worker.worker_owner.check_model", fail)
    with pytest.raises(WeightsRefused, match="KeyError: 'model'"):
        running.update_weights(str(folders / "1"))
    assert running.stats().state is EngineState.RUNNING
    assert rows(running) == fresh(0)
