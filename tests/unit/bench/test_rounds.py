"""`magicdec profile`: its table, and the price of tokens that rows share. Times are made up."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import pytest

from bench.micro.rounds import RoundTimes, measure, table
from engine.config.deployment import EngineConfig
from engine.control.step_times import StepSample
from engine.worker.profiler import Profiler
from server.cli import main
from tests.support.tiny import write_model

PRICES = {0: 0.25, 1: 0.5, 3: 1.0}


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def sharing(monkeypatch: pytest.MonkeyPatch) -> list[StepSample]:
    """Let profilers report the times of attention that reads shared pages once. Returns what they measured."""
    measured = []

    def measure(
        self: Profiler, rows: int, context: int, gamma: int, repeats: int = 2, *, sharing: bool = False
    ) -> StepSample:
        shared = (rows - 1) * self.shareable(context) if sharing else 0
        seconds = 1e-3 * (gamma + 1) + 1e-6 * (rows * context - (1 - PRICES[gamma]) * shared)
        measured.append(StepSample(rows, context, gamma, 1e-3 * gamma, seconds, shared))
        return measured[-1]

    monkeypatch.setattr(Profiler, "measure", measure)
    monkeypatch.setattr(Profiler, "shareable", lambda self, context: context // 64 * 64)
    return measured


def config_of(model: Path) -> EngineConfig:
    return EngineConfig.model_validate({"model": str(model), "device": "cpu"})


def test_prices(tiny_dir: Path, sharing: list[StepSample]) -> None:
    found = measure(config_of(tiny_dir), [1, 4], [64, 200], [1, 3], alpha=0.8)
    assert [(at.rows, at.context, at.gamma) for at in found] == [
        (rows, context, gamma) for rows in (1, 4) for context in (64, 200) for gamma in (1, 3)
    ]
    assert [(s.rows, s.context, s.gamma, s.shared) for s in sharing if s.shared] == [
        (4, 200, gamma, 3 * 192) for gamma in (0, 1, 3)
    ]
    for at in found:
        if at.rows == 1:
            assert at.plain_shared_price is at.shared_price is None
        else:
            assert at.plain_shared_price == pytest.approx(PRICES[0])
            assert at.shared_price == pytest.approx(PRICES[at.gamma])
    own = 1e-3 + 1e-6 * 4 * 200
    assert found[-1].t_target_ms == pytest.approx(1e3 * own)  # of rows that share nothing
    assert table(found, 0.8).splitlines()[-2:] == [
        "time of a KV token that rows share, relative to one that a row reads alone:",
        "     4 rows: 0.25 at gamma 0, 0.50 at gamma 1, 1.00 at gamma 3",
    ]


def test_one_context_tells_no_price(tiny_dir: Path, sharing: list[StepSample]) -> None:
    found = measure(config_of(tiny_dir), [4], [200], [1, 3], alpha=0.8)
    assert not any(sample.shared for sample in sharing)
    assert "share" not in table(found, 0.8)


def test_formats_of_weights_are_named(tiny_dir: Path, sharing: list[StepSample]) -> None:
    config = EngineConfig.model_validate(
        {"model": str(tiny_dir), "device": "cpu", "weights": "int8", "speculation": {"weights": "int4"}}
    )
    (found,) = measure(config, [1], [64], [1], alpha=0.8)
    assert (found.weights, found.draft_weights) == ("int8", "int4 and int8")
    assert "weights: int8, drafts int4 and int8" in table([found], 0.8).splitlines()


def test_command(
    tiny_dir: Path,
    tmp_path: Path,
    sharing: list[StepSample],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "times.json"
    flags = ["--model", str(tiny_dir), "--rows", "1,4", "--context", "64,200", "--gamma", "1,3", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["magicdec", "profile", *flags])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert "4 rows: 0.25 at gamma 0, 0.50 at gamma 1, 1.00 at gamma 3" in capsys.readouterr().out
    kept = msgspec.json.decode(file.read_bytes(), type=list[RoundTimes])
    assert [at.shared_price for at in kept] == [None] * 4 + [pytest.approx(PRICES[gamma]) for gamma in (1, 3)] * 2
