"""bench.gpu without a GPU: a tiny shape shows which parts it measures; the times mean nothing here."""

from __future__ import annotations

import dataclasses
import gc
import json
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import DeviceType  # type: ignore[attr-defined]

from bench.corpus import BenchError
from bench.gpu import __main__ as gpu
from bench.gpu import gpu_rounds
from bench.gpu.device_busy import busy_seconds, covered, device_spans
from bench.gpu.gpu_report import device_state
from bench.gpu.gpu_rounds import Bench
from bench.gpu.synthetic import RandomVerify, synthetic_acceptance
from bench.micro.bandwidth import copy_bandwidth
from bench.micro.host import Host
from engine.oom import OutOfMemory
from engine.plan import RoundPlan, RoundResult, RowFailure
from engine.speculation import round as round_module
from engine.speculation.verify import verify
from kernels.reference_ops import REFERENCE
from models.known_shapes import SHAPES
from tests.support.engines import TINY
from tests.support.profiles import only_in_all, whole_test_only_in_all
from tests.support.rig import CPU

SHAPE = dataclasses.replace(TINY, num_heads=4, head_dim=16, hidden_size=64)
TOKEN_BYTES = 2 * 2 * 2 * 16 * 4


def bench(points: list[tuple[int, int]], memory: int = 1 << 30, **settings: Any) -> Bench:
    return Bench(
        "tiny",
        SHAPE,
        points,
        gamma=3,
        budget=32,
        device=CPU,
        dtype=torch.float32,
        memory=memory,
        page_size=4,
        **{"ops": REFERENCE, "rounds": 40, **settings},
    )


@pytest.mark.parametrize(
    ("alpha", "accepted"), [only_in_all(0.0, 0.0), only_in_all(1.0, 3.0), (0.8, 0.8 + 0.64 + 0.512)]
)
def test_chance_accepts(alpha: float, accepted: float) -> None:
    made = bench([(5, 100)])
    found = made.measure(5, 100, alpha=alpha, ceiling=1e9)
    made.close()
    assert found.accepted == pytest.approx(accepted, abs=0.25)
    assert (found.rows, found.context, found.gamma, found.gap) == (5, 100, 3, None)
    assert (len(found.plain_rounds_ms), len(found.rounds_ms)) == (40, 40)
    assert found.plain_tokens_per_second == pytest.approx(5e3 / found.t_target_ms)
    assert found.tokens_per_second == pytest.approx(5e3 * (found.accepted + 1) / found.t_round_ms)
    assert found.speedup == pytest.approx(found.tokens_per_second / found.plain_tokens_per_second)
    read = 1e3 * (made.weight_bytes + 5 * 100 * TOKEN_BYTES) / 1e9
    assert found.floor_ms == pytest.approx(read)
    assert found.t_round_ms >= found.t_verify_ms > 0


def test_what_does_not_fit_is_left_out() -> None:
    made = bench([(1, 50), (200, 1500), (1, 2000)], memory=50 * 1000 * 1000)
    assert made.points == [(1, 50)]
    (rows, context, memory), (_, _, length) = made.left_out
    assert (rows, context) == (200, 1500)
    assert memory.startswith("needs ")
    assert memory.endswith(" GB, and 0.1 are free")
    assert length == "longer than the model's 2048 tokens"
    made.close()
    made = bench([(200, 1500)], memory=1000)
    assert not made.points
    made.close()


def test_as_many_rows_as_fit() -> None:
    made = bench([(rows, 1500) for rows in range(200, 0, -1)], memory=20 * 1000 * 1000, only_first=True)
    ((rows, _),) = made.points
    weights = made._model.matrix_bytes + made._model.table_bytes
    row_bytes = -(-(1500 + made._room) // 4) * 4 * TOKEN_BYTES
    assert rows == (20 * 1000 * 1000 - weights) // row_bytes
    made.close()


def test_nothing_keeps_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next shape needs its memory."""
    order: list[str] = []

    def ask(device: torch.device) -> tuple[int, int]:
        order.append("ask")
        return gpu_rounds.KEPT_BYTES + 7, 0

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: order.append("empty"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", ask)
    made = bench([(2, 50)], rounds=2)
    made.measure(2, 50, alpha=0.5, ceiling=1e9)
    model, pool = weakref.ref(made._model), weakref.ref(made._engine._worker._target.pool)
    gc.disable()  # close collects by itself
    try:
        made.close()
        assert (model(), pool()) == (None, None)
    finally:
        gc.enable()
    assert order == []
    assert gpu_rounds.free_bytes(torch.device("cuda")) == 7
    assert order == ["empty", "ask"]


@whole_test_only_in_all
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # outputs of padding queries are undefined
def test_captured_rounds() -> None:
    """Rows that sample replay graphs as greedy ones do, and graphs keep no model either."""
    pytest.importorskip("triton", reason="Triton is not installed: there are no builds for this platform")
    from kernels.gpu import INTERPRETED
    from kernels.gpu.gpu_ops import GpuOps

    if not INTERPRETED:
        pytest.skip("the stand-in for graphs needs interpreted kernels")
    from tests.support.recorded import Recorded

    recorded = Recorded()
    made = bench([(2, 20)], rounds=2, temperature=0.6, ops=GpuOps(make_recorder=lambda: recorded))
    lengths = made._start(2, 20)
    replays = []
    for gamma in (0, 0, 3, 3):
        before = recorded.replayed
        made._round(lengths, gamma)
        replays.append(recorded.replayed - before)
    assert replays == [1, 1, 3, 3]  # target pass; first draft step, all others, target pass
    model = weakref.ref(made._model)
    del lengths
    made.close()
    assert model() is None


def test_rows_sample_at_the_temperature_given(monkeypatch: pytest.MonkeyPatch) -> None:
    made = bench([(3, 50)], temperature=0.6)
    plans: list[RoundPlan] = []
    run = made._run

    def recorded(plan: RoundPlan) -> RoundResult:
        plans.append(plan)
        return run(plan)

    monkeypatch.setattr(made, "_run", recorded)
    made._start(3, 50)
    made.close()
    (plan,) = plans
    assert [(start.params.temperature, start.params.seed) for start in plan.starts] == [(0.6, 0), (0.6, 1), (0.6, 2)]
    pages = [page for delta in plan.pages for page in delta.pages]
    assert sorted(pages) == list(range(len(pages)))  # each page once
    assert pages != sorted(pages)


def test_rows_that_fail_end_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    made = bench([(1, 50)])
    failed = RoundResult(0, [], 0.0, 0.0, failures=[RowFailure(0, "not a number", False)])
    monkeypatch.setattr(made, "_run", lambda plan: failed)
    with pytest.raises(BenchError, match="tiny: 1 rows failed: not a number"):
        made.measure(1, 50, alpha=0.5, ceiling=1e9)
    monkeypatch.undo()
    made.close()


def test_engines_know_of_no_chance() -> None:
    assert vars(round_module)["verify"] is verify
    with synthetic_acceptance(0.5):
        assert vars(round_module)["verify"] is not verify
    assert vars(round_module)["verify"] is verify


def event(kind: DeviceType, start: float, end: float, **more: bool) -> SimpleNamespace:
    return SimpleNamespace(device_type=kind, time_range=SimpleNamespace(start=start, end=end), **more)


def test_what_the_device_does() -> None:
    """Kernels and copies count once where they overlap; calls of the runtime on the host, and annotations, do not."""
    events = [
        event(DeviceType.CUDA, 10, 14),
        event(DeviceType.CPU, 0, 40),
        event(DeviceType.CUDA, 12, 13, is_user_annotation=False),
        event(DeviceType.CUDA, 0, 40, is_user_annotation=True),
        event(DeviceType.CUDA, 2, 5),
        event(DeviceType.CUDA, 13, 17),
    ]
    spans = device_spans(events)
    assert spans == [(2, 5), (10, 14), (12, 13), (13, 17)]
    assert covered(spans) == 10
    assert covered([(0, 3), (1, 2), (2, 5), (7, 8), (8, 9)]) == 7
    assert covered([]) == 0
    assert device_spans([event(DeviceType.CPU, 0, 5)]) == []


def test_busy_time_of_a_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the profiler itself takes is in no time."""
    events = [event(DeviceType.CUDA, 0, 3e6), event(DeviceType.CPU, 0, 9e6)]

    class Profile:
        def __init__(self, activities: object) -> None: ...

        def __enter__(self) -> None: ...

        def __exit__(self, *exception: object) -> None: ...

        def events(self) -> list[SimpleNamespace]:
            return events

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    work: list[str] = []
    assert busy_seconds(lambda: work.append("done"), torch.device("cuda")) == 3
    events[:] = events[1:]
    assert busy_seconds(lambda: work.append("done"), torch.device("cuda")) is None
    assert work == ["done", "done"]
    assert busy_seconds(lambda: work.append("done"), CPU) is None


def test_idle_time_is_of_a_round_without_the_profiler(monkeypatch: pytest.MonkeyPatch) -> None:
    made = bench([(2, 50)], rounds=2)
    result = made.measure(2, 50, alpha=0.5, ceiling=1e9)
    result = dataclasses.replace(result, t_target_ms=10.0, t_round_ms=40.0)
    monkeypatch.setattr(made, "_device", torch.device("cuda"))
    monkeypatch.setattr(gpu_rounds, "busy_seconds", lambda work, device: work() or 3 * 9e-3)
    found = made.observe_gaps(result)
    assert (found.gap_plain, found.gap) == pytest.approx((0.1, 1 - 9 / 40))
    monkeypatch.undo()
    made.close()


@given(st.floats(0, 1), st.integers(1, 200), st.integers(1, 8))
def test_rounds_have_the_mean_of_their_distribution(alpha: float, rows: int, gamma: int) -> None:
    """Each round is within one row of it, at each number of accepted drafts."""
    accepted = RandomVerify(alpha).accepted(np.full(rows, gamma))
    assert ((accepted >= 0) & (accepted <= gamma)).all()
    for i in range(1, gamma + 1):
        assert abs((accepted >= i).sum() - rows * alpha**i) <= 1 + 1e-6


def test_rows_accept_no_more_than_they_draft() -> None:
    assert RandomVerify(1.0).accepted(np.array([3, 1, 0])).tolist() == [3, 1, 0]
    assert RandomVerify(0.0).accepted(np.array([3, 1, 0])).tolist() == [0, 0, 0]
    assert RandomVerify(0.5).accepted(np.array([], dtype=np.int64)).tolist() == []


def test_copy_bandwidth() -> None:
    assert copy_bandwidth(CPU, size=1 << 20, repeats=2) > 0


def test_the_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(SHAPES, "tiny", SHAPE)
    file = tmp_path / "gpu.json"
    flags = "--device cpu --kernels reference --shapes tiny --points 2x40,3x80 --rounds 2 --budget 32 --json"
    monkeypatch.setattr(sys, "argv", ["gpu", *flags.split(), str(file)])
    assert gpu.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("synthetic acceptance 0.8" in line for line in lines) == 2
    assert [each["rows"] for each in json.loads(file.read_text())["results"]] == [2, 3]
    for wrong in (
        *("--points 3", "--points 0x5", "--shapes none", "--gamma 0", "--synthetic-acceptance 2", "--rounds 1"),
        *("--terms none", "--terms vegas --gamma 6", "--terms vegas --budget 512"),
        *("--terms vegas --synthetic-acceptance 0.8", "--terms vegas --draft-weights int4"),
    ):
        monkeypatch.setattr(sys, "argv", ["gpu", *wrong.split()])
        with pytest.raises(SystemExit):
            gpu.main()


def test_state_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")
    asked: list[list[str]] = []
    answers = iter(["1980 MHz, 1980 MHz, 2619 MHz, 345.10 W, 700.00 W, 41\n", "No devices were found\n"])

    def smi(command: list[str], **_: object) -> SimpleNamespace:
        asked.append(command)
        return SimpleNamespace(stdout=next(answers))

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1-2"))
    monkeypatch.setattr(subprocess, "run", smi)
    said = "SM clock 1980 MHz of 1980 MHz, memory clock 2619 MHz, 345.10 W of 700.00 W, 41 °C"
    assert [device_state(device), device_state(device)] == [said, ""]
    assert asked[0][-1] == "--id=GPU-1-2"
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1-2"))
    monkeypatch.setenv("PATH", "")
    assert device_state(device) == device_state(CPU) == ""


def run(monkeypatch: pytest.MonkeyPatch, flags: str) -> int:
    monkeypatch.setitem(SHAPES, "tiny", SHAPE)
    monkeypatch.setattr(sys, "argv", ["gpu", *f"--device cpu --kernels reference --shapes tiny {flags}".split()])
    return gpu.main()


@whole_test_only_in_all
def test_on_the_terms_of_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "vegas.json"
    assert run(monkeypatch, f"--terms vegas --points 12x300 --rounds 8 --json {file}") == 0
    results = json.loads(file.read_text())["results"]
    assert [each["policy"] for each in results] == ["window", "verified", "quest"]
    assert {(each["weights"], each["draft_weights"]) for each in results} == {("dense", "dense")}
    assert [each["accepted"] + 1 for each in results] == pytest.approx([4.92, 6.24, 5.43], abs=0.3)
    assert {(each["rows"], each["gamma"], each["temperature"], each["budget"]) for each in results} == {
        (12, 6, 0.6, 256)
    }
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[3] for line in lines[-5:-1]] == ["plain", "window", "verified", "quest"]
    assert lines[-1].startswith("quest: ")


def test_kernels_without_a_format(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(type(REFERENCE), "weight_formats", frozenset(["dense"]))
    assert run(monkeypatch, "--points 2x40 --draft-weights int4") == 1
    assert "error: reference kernels do not multiply by int4 weights" in capsys.readouterr().err


def test_less_memory_than_one_row(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu, "_CPU_BYTES", 1000)
    assert run(monkeypatch, "--terms vegas --points 3x300") == 1
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if "are free" in line] == [
        f"tiny, {policy}, 1 x 300: needs 0.0 GB, and 0.0 are free" for policy in ("window", "verified", "quest")
    ]


def test_a_point_without_memory_ends_no_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measure = Bench.measure

    def scarce(self: Bench, rows: int, context: int, **more: float) -> Any:
        if rows == 2:
            raise OutOfMemory("no room\nmore")
        return measure(self, rows, context, **more)

    monkeypatch.setattr(Bench, "measure", scarce)
    file = tmp_path / "gpu.json"
    assert run(monkeypatch, f"--points 2x40,3x40 --rounds 2 --json {file}") == 0
    note = "tiny, 2 x 40: OutOfMemory: no room"
    assert note in capsys.readouterr().out.splitlines()
    said = json.loads(file.read_text())
    assert ([each["rows"] for each in said["results"]], said["notes"]) == ([3], [note])


def test_no_shape_is_made_when_time_is_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "Bench", None)
    assert run(monkeypatch, "--seconds 0") == 1
    assert "tiny: no time was left" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu"])
    assert gpu.main() == 1
    assert capsys.readouterr().err == "error: no CUDA device is present\n"


@pytest.mark.parametrize("gamma", [0, 3])
def test_what_a_device_waits_for(gamma: int) -> None:
    """The parts of a round that Host measures, while contexts grow by several pages."""
    parts = Host(3, 40, gamma, 32, 30).run().seconds
    assert set(parts) - {"first draft step", "further draft steps"} == {
        "plan the round",
        "patch the rank's state",
        "verify pass",
        "commit",
        "build outputs",
        "encode outputs",
    }
    assert ("further draft steps" in parts) == (gamma > 1)
    assert all(seconds > 0 for seconds in parts.values())
